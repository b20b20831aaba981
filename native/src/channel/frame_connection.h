// One connection of the channel: whole frames in and out of a socket. On the loop only, and nothing waits.
//
// The Handler owns its connection; what is not read yet by the other end is kept here, and how much of it there may be is
// the Handler's business (unsent). A connection that ends by itself tells its Handler once; Close tells nobody.
#ifndef DATADIST_CHANNEL_FRAME_CONNECTION_H_
#define DATADIST_CHANNEL_FRAME_CONNECTION_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/fd.h"
#include "base/status.h"
#include "control/event_loop.h"
#include "control/frame.h"
#include "control/session.h"

namespace datadist {

class FrameConnection : public std::enable_shared_from_this<FrameConnection> {
 public:
  // Any member may close the connection, give it another Handler, or drop it.
  class Handler {
   public:
    virtual ~Handler() = default;
    virtual TypeSet LegalOnLoop() const = 0;
    // Not ok: the connection ends, for that reason.
    virtual Status OnFrameOnLoop(const Frame &frame) = 0;
    // kByPeer or kProtocol.
    virtual void OnEndedOnLoop(CloseCause cause, const Status &why) = 0;
  };
  // Whether frames are taken in while the other end has not read what it was sent. Who answers must not: a peer that
  // reads nothing would fill our memory.
  enum class Reads : uint8_t { kAlways, kWhenAllIsSent };

  // `loop` outlives the connection, or has been stopped.
  static std::shared_ptr<FrameConnection> OpenOnLoop(EventLoop &loop, FrameSocket socket, Reads reads,
                                                     Handler *handler);
  ~FrameConnection() { CloseOnLoop(); }
  FrameConnection(const FrameConnection &) = delete;
  FrameConnection &operator=(const FrameConnection &) = delete;

  void SetHandlerOnLoop(Handler *handler) { handler_ = handler; }
  // Frames have these seals from now on. Between two frames only.
  void SetSealsOnLoop(FrameSeal in, FrameSeal out);

  void SendOnLoop(MessageType type, uint32_t seq, const std::vector<uint8_t> &body);
  // Memory of what the other end has not taken yet: all of it, until it has taken the last byte.
  size_t unsent() const { return outbox_.capacity(); }
  // Since when a frame has begun and not ended, or what was sent has not been read.
  std::optional<EventLoop::Clock::time_point> stuck_since() const { return stuck_since_; }
  void CloseOnLoop();

 private:
  FrameConnection(EventLoop &loop, FrameSocket socket, Reads reads, Handler *handler)
      : loop_(loop),
        fd_(std::move(socket.fd)),
        reads_(reads),
        handler_(handler),
        reader_(std::move(socket.in)),
        seal_(std::move(socket.out)) {}

  void OnEventsOnLoop(uint32_t events);
  bool ReadOnLoop();
  void FlushOnLoop();
  bool WantsFrames() const { return reads_ == Reads::kAlways || outbox_.empty(); }
  void NoteProgressOnLoop(bool moved);
  void EndOnLoop(CloseCause cause, const Status &why);

  EventLoop &loop_;
  Fd fd_;
  const Reads reads_;
  Handler *handler_;
  FrameReader reader_;
  FrameSeal seal_;
  std::vector<uint8_t> outbox_;
  uint64_t watch_ = 0;
  uint32_t watched_ = 0;
  std::optional<EventLoop::Clock::time_point> stuck_since_;
};

}  // namespace datadist

#endif  // DATADIST_CHANNEL_FRAME_CONNECTION_H_
