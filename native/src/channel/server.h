// P's end of the channel: answers what a D asks, from a thread of its own. What it answers from (the leases, the
// geometries) is here, so that an answer waits for nobody: not for the steps of a model, nor for the GIL.
//
//   FrontDoor (who may enter) ──CHANNEL──> Guests ── DESCRIBE_RANK ──> geometries
//                                                ├─ RENEW, CONFIRM, RELEASE ──> LeaseTable
//                                                ├─ AWAIT, REPORT, DELIVER ──> HandoffTable; RENEW, RELEASE ask it first
//                                                ├─ OFFER, WATCH ──> RankOrders
//                                                └─ SWITCH, DECLARE ──> RoleDesk ──> RoleSwitch
//
// What guests can make grow has a limit: their number (of whoever has the most, the one that was silent longest leaves),
// what they begin and do not end, what they do not read, how much they wait for, how long they may say nothing.
#ifndef DATADIST_CHANNEL_SERVER_H_
#define DATADIST_CHANNEL_SERVER_H_

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/status.h"
#include "channel/guests.h"
#include "channel/handoff_table.h"
#include "channel/lease_table.h"
#include "channel/messages.h"
#include "channel/rank_geometries.h"
#include "channel/role_switch.h"
#include "control/address.h"
#include "control/event_loop.h"
#include "control/front_door.h"
#include "control/key_ring.h"

namespace datadist {

// Who answers.
struct Grantor {
  std::string engine_id;
  GrantorIncarnation incarnation{};
  uint16_t content_version = 0;
};

class ChannelServer {
 public:
  using Geometries = RankGeometries::Map;

  // Listens at once. LLM_PARAM_INVALID for an address that other hosts can reach where `trust` says neither whom to let
  // in nor that anybody may come, LLM_FAILED for one that cannot be bound. Without `handoffs` it knows of none, and
  // without `roles` it keeps the role that it has.
  static Result<std::unique_ptr<ChannelServer>> Create(const SocketAddress &address, Grantor grantor, const Trust &trust,
                                                       std::shared_ptr<LeaseTable> leases,
                                                       const ChannelLimits &limits = {},
                                                       std::shared_ptr<HandoffTable> handoffs = nullptr,
                                                       std::shared_ptr<RoleSwitch> roles = nullptr);
  ~ChannelServer();  // Close
  ChannelServer(const ChannelServer &) = delete;
  ChannelServer &operator=(const ChannelServer &) = delete;

  // LLM_PARAM_INVALID for one that no message has room for. Any thread.
  Status SetGeometries(Geometries geometries);
  // Clusters whose last connection has ended a while ago, each once: nobody of theirs will use a link of ours. Any thread.
  std::vector<uint64_t> TakeLeftAskers();
  uint16_t port() const { return port_; }
  // Ends all connections and gives the address back. Idempotent; any thread.
  void Close();
  bool in_forked_child() const;

 private:
  class State;
  ChannelServer(std::shared_ptr<State> state, uint16_t port) : state_(std::move(state)), port_(port) {}
  std::shared_ptr<State> state_;
  const uint16_t port_;
};

}  // namespace datadist

#endif  // DATADIST_CHANNEL_SERVER_H_
