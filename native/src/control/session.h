// The control connection of one established link: requests and responses by seq, heartbeat, orderly end.
//
//   caller threads ── Call / Send ──> socket ──> peer
//   loop thread    <── frames ── socket;  responses wake their caller, requests go to the Handler
//
// Lifecycle: Start -> any number of calls -> closed once, for one reason: the peer closed, broke the protocol, was
// silent for three heartbeat intervals, did not read what it was sent, or Close. From then on pending and later calls
// fail with LLM_FAILED and that reason, and the Handler has been or will be told once, on the loop.
//
// The loop keeps a session alive until it is closed.
#ifndef DATADIST_CONTROL_SESSION_H_
#define DATADIST_CONTROL_SESSION_H_

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/deadline.h"
#include "base/fd.h"
#include "base/status.h"
#include "control/event_loop.h"
#include "control/frame.h"

namespace datadist {

enum class CloseCause : uint8_t { kByUs, kByPeer, kSilent, kProtocol };

class SessionHandler {
 public:
  virtual ~SessionHandler() = default;
  // A request of the peer. Not ok: the request breaks the protocol, and the session closes.
  virtual Status OnRequestOnLoop(const Frame &frame) = 0;
  virtual void OnClosedOnLoop(CloseCause cause, const std::string &reason) = 0;
};

class Session : public std::enable_shared_from_this<Session> {
 public:
  static std::shared_ptr<Session> Create(std::shared_ptr<EventLoop> loop, FrameSocket socket,
                                         std::chrono::milliseconds heartbeat_interval);
  ~Session() = default;
  Session(const Session &) = delete;
  Session &operator=(const Session &) = delete;

  // Begins to read. From any thread.
  void Start(std::weak_ptr<SessionHandler> handler);

  // Sends a request and waits for its answer, which is of type `answer`. LLM_TIMEOUT at the deadline; the answer is
  // then dropped when it comes. Not on the loop.
  Result<Frame> Call(MessageType request, const std::vector<uint8_t> &body, MessageType answer, Deadline deadline);

  // A one-way message, or the answer to `seq`. From any thread, never blocks.
  void Send(MessageType type, uint32_t seq, const std::vector<uint8_t> &body);

  // Whether the peer's end of the connection is gone. From any thread.
  bool Ended() const;

  // From any thread, idempotent. Wakes callers at once.
  void Close(CloseCause cause, const std::string &reason);

 private:
  struct PendingCall {
    MessageType answer;
    std::optional<Frame> frame;
    bool given_up = false;  // nobody waits any more; at most as many as calls of ours have timed out
  };
  Session(std::shared_ptr<EventLoop> loop, FrameSocket socket, std::chrono::milliseconds heartbeat_interval);

  void StartOnLoop();
  void OnEventsOnLoop(uint32_t events);
  bool ReadOnLoop();
  TypeSet LegalOnLoop();
  Status OnFrameOnLoop(Frame frame);
  Status OnAnswerOnLoop(Frame frame);
  void OnHeartbeatOnLoop();
  void FinishOnLoop();
  void FlushLocked();

  const std::shared_ptr<EventLoop> loop_;
  const Fd fd_;
  const std::chrono::milliseconds heartbeat_interval_;

  std::mutex mutex_;  // guards all below up to the loop's own
  std::condition_variable changed_;
  std::map<uint32_t, PendingCall> pending_;
  uint32_t last_seq_ = 0;
  FrameSeal seal_;  // of what is sent
  std::vector<uint8_t> outbox_;
  bool want_writable_ = false;
  bool closed_ = false;
  CloseCause cause_ = CloseCause::kByUs;
  std::string reason_;

  // Owned by the loop thread.
  std::weak_ptr<SessionHandler> handler_;
  FrameReader reader_;
  uint64_t watch_ = 0;
  uint64_t heartbeat_timer_ = 0;
  uint32_t silent_intervals_ = 0;
};

}  // namespace datadist

#endif  // DATADIST_CONTROL_SESSION_H_
