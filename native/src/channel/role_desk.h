// Where an operator asks an instance to change its role, and its ranks say what has become of it. On the loop only.
//
//   SWITCH ──> may he? ──> RoleSwitch ──order──> RankOrders ──WATCHED──> rank ──DECLARE──> RoleSwitch ──> SWITCHED
#ifndef DATADIST_CHANNEL_ROLE_DESK_H_
#define DATADIST_CHANNEL_ROLE_DESK_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "channel/messages.h"
#include "channel/rank_orders.h"
#include "channel/role_switch.h"
#include "control/event_loop.h"
#include "control/front_door.h"

namespace datadist {

class RoleDesk {
 public:
  // To a SWITCH that is parked no more. May drop guests.
  using Answer = std::function<void(uint64_t guest, uint32_t seq, const SwitchStatus &status)>;
  // Beyond these nobody waits: they are told how far it is.
  static constexpr size_t kMostParked = 64;

  // Without `roles` the instance keeps the role that it has. `loop` outlives it, or has been stopped.
  RoleDesk(EventLoop &loop, std::shared_ptr<RoleSwitch> roles, RankOrders &orders, Answer answer)
      : loop_(loop), roles_(std::move(roles)), orders_(orders), answer_(std::move(answer)) {}
  RoleDesk(const RoleDesk &) = delete;
  RoleDesk &operator=(const RoleDesk &) = delete;

  void AskOnLoop(uint64_t guest, uint32_t seq, const Caller &caller, const Switch &wish);
  void DeclareOnLoop(const Declare &said);
  void DropOnLoop(uint64_t guest);

 private:
  struct Parked {
    uint64_t guest;
    uint32_t seq;
    Switch wish;
    EventLoop::Clock::time_point over;
  };
  void LookOnLoop();
  void SettleOnLoop();

  EventLoop &loop_;
  const std::shared_ptr<RoleSwitch> roles_;
  RankOrders &orders_;
  const Answer answer_;
  std::vector<Parked> parked_;
  uint64_t timer_ = 0;
};

}  // namespace datadist

#endif  // DATADIST_CHANNEL_ROLE_DESK_H_
