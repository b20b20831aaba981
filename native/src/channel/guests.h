// The connections that the channel's server has let in, and what makes them leave: that they end, say nothing, leave too
// much unread, do not end what they began, or that another needs the room. On the loop only.
#ifndef DATADIST_CHANNEL_GUESTS_H_
#define DATADIST_CHANNEL_GUESTS_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/log.h"
#include "base/status.h"
#include "channel/frame_connection.h"
#include "control/event_loop.h"
#include "control/front_door.h"

namespace datadist {

struct ChannelLimits {
  size_t guests = 1024;
  size_t unsent = 64U << 20;  // bytes that all guests together have not read
  std::chrono::milliseconds stuck{10'000};  // for a frame to end, and for what was sent to be read
  std::chrono::milliseconds idle{600'000};  // longer than a client of ours keeps a connection that it does not use
  std::chrono::milliseconds grace{30'000};  // for who dials again
  size_t awaits = 65536;                    // hand-offs that guests wait for, all together; who has the most leaves
  size_t awaits_per_guest = 4096;
};

class Guests {
 public:
  struct Request {
    uint64_t guest;
    const Caller &caller;
    const Frame &frame;
  };
  class Host {
   public:
    virtual ~Host() = default;
    // Not ok: the guest leaves. What is sent here may make any guest leave, also this one.
    virtual Status OnRequestOnLoop(const Request &request) = 0;
    // Nothing of that guest comes any more, and nothing can be sent to it.
    virtual void OnLeftOnLoop(uint64_t guest) = 0;
  };

  // `loop` and `host` outlive it, or the loop has been stopped after Clear.
  Guests(EventLoop &loop, const ChannelLimits &limits, TypeSet requests, Host &host);
  ~Guests();
  Guests(const Guests &) = delete;
  Guests &operator=(const Guests &) = delete;

  void WelcomeOnLoop(Caller caller, FrameSocket socket);
  // To one that has not left. May make any guest leave.
  void SendOnLoop(uint64_t guest, MessageType type, uint32_t seq, const std::vector<uint8_t> &body);
  void EndOnLoop(uint64_t guest);
  void ClearOnLoop();

 private:
  class Guest;
  using TimePoint = EventLoop::Clock::time_point;
  using Map = std::map<uint64_t, std::unique_ptr<Guest>>;
  Map::iterator EndOnLoop(Map::iterator guest);
  void MakeRoomOnLoop();
  void EndUnreadOnLoop();
  void SweepOnLoop();

  EventLoop &loop_;
  const ChannelLimits limits_;
  const TypeSet requests_;
  Host &host_;
  uint64_t last_id_ = 0;
  Map guests_;
  uint64_t sweep_timer_ = 0;
  LogBudget log_budget_;
};

}  // namespace datadist

#endif  // DATADIST_CHANNEL_GUESTS_H_
