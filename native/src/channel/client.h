// D's end of the channel: requests to many servers, each with its own time. Nothing blocks the caller: requests are sent,
// and servers dialled, by a thread of its own.
//
//   Send ──> one connection per server, dialled when it is needed ──> answer, or why there is none ──> Take
//
// Contract:
//   - Every id comes back in exactly one ChannelAnswer, unless the client is closed before.
//   - A server that lets a request time out gets a fresh connection for the next, when none waits for it any more.
//   - A request whose connection ends under it is sent again, over a new one, as long as its time lasts: all requests
//     are idempotent. The first new one is dialled at once, because what was not used for a while may be gone without
//     our knowing; those after it after a pause that grows.
//   - Where nobody listens, or who listens refuses us, all that waits for that server comes back at once.
//
// Threads: every member may be called from any thread. event_fd() is readable exactly while answers wait. After fork()
// the child may only destroy it.
#ifndef DATADIST_CHANNEL_CLIENT_H_
#define DATADIST_CHANNEL_CLIENT_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "base/status.h"
#include "channel/messages.h"
#include "control/address.h"
#include "control/key_ring.h"

namespace datadist {

struct NoAnswer {
  std::string error;
  bool timed_out = false;  // somebody listens there, or nothing is known of it: to ask again may help
};
struct Released {};
struct Reported {};

struct ChannelAnswer {
  uint64_t id = 0;
  std::variant<NoAnswer, RankAnswer, Renewed, Confirmed, Released, HandoffNews, Reported, Offered, Watched,
               SwitchStatus>
      answer;
};

using ChannelRequest = std::variant<DescribeRank, Renew, Confirm, Release, Await, ReportProgress, Offer, Watch, Deliver,
                                    Declare, Switch>;

struct ChannelClientLimits {
  // So that forged addresses cannot make us pile up connections; above the instances that a rank may know, or the links
  // of a provider could not all be used: 1024, and 256 that have not shown who they are.
  size_t servers = 1280;
  std::chrono::milliseconds idle{300'000};  // longer than the renewals of a lease are apart, or each would dial anew
};

class ChannelClient {
 public:
  // LLM_FAILED when the system refuses a thread or an eventfd.
  static Result<std::unique_ptr<ChannelClient>> Create(uint16_t content_version, const Trust &trust,
                                                       const ChannelClientLimits &limits = {});
  ~ChannelClient();  // Close
  ChannelClient(const ChannelClient &) = delete;
  ChannelClient &operator=(const ChannelClient &) = delete;

  // `ip` is a literal. Returns the request's id, which counts from 1. What cannot be sent comes back by Take as well.
  // The time of an Await, a Watch or a Switch begins when its patience is over.
  uint64_t Send(const std::string &ip, uint16_t port, const ChannelRequest &request, std::chrono::milliseconds timeout);
  std::vector<ChannelAnswer> Take();
  int event_fd() const;
  // Drops what is outstanding, and waits for nobody. Idempotent.
  void Close();
  bool in_forked_child() const;

 private:
  class State;
  explicit ChannelClient(std::shared_ptr<State> state) : state_(std::move(state)) {}
  std::shared_ptr<State> state_;
};

}  // namespace datadist

#endif  // DATADIST_CHANNEL_CLIENT_H_
