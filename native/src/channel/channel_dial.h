// One dial of a P's channel, without waiting: within the host or over TCP, opened by key where one is asked for, greeted.
// On the loop only. It has no time limit of its own: whoever needs the connection knows how long that is of use.
#ifndef DATADIST_CHANNEL_CHANNEL_DIAL_H_
#define DATADIST_CHANNEL_CHANNEL_DIAL_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "base/status.h"
#include "channel/frame_connection.h"
#include "control/address.h"
#include "control/event_loop.h"
#include "control/key_ring.h"
#include "control/opening.h"

namespace datadist {

class ChannelDial : public FrameConnection::Handler {
 public:
  // A connection that was greeted, and needs a Handler; or why there is none.
  using Done = std::function<void(Result<std::shared_ptr<FrameConnection>>)>;

  // `done` is called once, never from the constructor or StartOnLoop, and may destroy the ChannelDial.
  ChannelDial(EventLoop &loop, const SocketAddress &address, const Trust &trust, uint16_t content_version, Done done)
      : loop_(loop), address_(address), trust_(trust), content_version_(content_version), done_(std::move(done)) {}
  ~ChannelDial() override;
  ChannelDial(const ChannelDial &) = delete;
  ChannelDial &operator=(const ChannelDial &) = delete;

  void StartOnLoop();
  // Whether the connection was made and ended before it was greeted: the next one may live.
  bool was_cut() const { return cut_; }

  TypeSet LegalOnLoop() const override;
  Status OnFrameOnLoop(const Frame &frame) override;
  void OnEndedOnLoop(CloseCause cause, const Status &why) override;

 private:
  void TryOnLoop();
  void TryTcpOnLoop();
  void OnConnectedOnLoop();
  Status OpenOnLoop();
  void GreetOnLoop();
  Status OnOpenedOnLoop(const Frame &frame);
  Status OnReadyOnLoop(const Frame &frame);
  void AgainOnLoop(std::chrono::milliseconds pause);
  void EndOnLoop(const Status &why);

  EventLoop &loop_;
  const SocketAddress address_;
  const Trust trust_;
  const uint16_t content_version_;
  Done done_;
  std::string note_;  // why a process of this host that listens there was not taken
  uint64_t timer_ = 0;
  Fd connecting_;
  uint64_t watch_ = 0;
  std::optional<ClientOpening> opening_;
  bool opened_ = false;
  bool cut_ = false;
  std::shared_ptr<FrameConnection> connection_;
};

}  // namespace datadist

#endif  // DATADIST_CHANNEL_CHANNEL_DIAL_H_
