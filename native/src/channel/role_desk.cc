#include "channel/role_desk.h"

#include <algorithm>
#include <chrono>
#include <optional>
#include <string>
#include <utility>

#include "base/log.h"

namespace datadist {
namespace {

// How often it is looked whether anything is held: leases end by time, too, of which nobody is told.
constexpr std::chrono::milliseconds kLook{10};

SwitchStatus Refused(std::string reason) {
  SwitchStatus status;
  status.reason = std::move(reason);
  return status;
}

bool IsUnderWay(const SwitchStatus &status) {
  return status.state == SwitchState::kDraining || status.state == SwitchState::kApplying;
}

}  // namespace

void RoleDesk::AskOnLoop(uint64_t guest, uint32_t seq, const Caller &caller, const Switch &wish) {
  if (!caller.IsKnown()) {
    answer_(guest, seq, Refused("who switches it must be a process of its user on its host, or know its key (auth)"));
    return;
  }
  if (roles_ == nullptr) {
    answer_(guest, seq, Refused("it was not started with role_switch"));
    return;
  }
  const bool was_under_way = roles_->IsUnderWay();
  const SwitchStatus status = roles_->Ask(wish.id, wish.role, std::chrono::milliseconds(wish.drain_ms));
  if (!IsUnderWay(status) || parked_.size() >= kMostParked) {
    answer_(guest, seq, status);
    return;
  }
  parked_.push_back({guest, seq, wish, EventLoop::Clock::now() + std::chrono::milliseconds(wish.patience_ms)});
  if (!was_under_way) {
    Log(LogLevel::kInfo, std::string("role: from ") + NameOf(status.role) + " to " + NameOf(wish.role) +
                             ", asked for by " + caller.name);
    LookOnLoop();
  }
}

void RoleDesk::LookOnLoop() {
  loop_.StopTimerOnLoop(std::exchange(timer_, 0));
  if (const std::optional<RoleOrder> order = roles_->Advance()) {
    roles_->Ordered(*order, orders_.PutRoleOnLoop(*order));
  }
  if (roles_->IsUnderWay()) {
    timer_ = loop_.StartTimerOnLoop(EventLoop::Clock::now() + kLook, [this] { LookOnLoop(); });
  } else {
    Log(LogLevel::kInfo, std::string("role: ") + NameOf(roles_->role()));
  }
  SettleOnLoop();
}

// All of them when it has ended.
void RoleDesk::SettleOnLoop() {
  const auto now = EventLoop::Clock::now();
  const bool goes_on = roles_->IsUnderWay();
  const auto is_settled = [&](const Parked &each) { return !goes_on || now >= each.over; };
  // One by one: an answer can make others leave.
  for (auto at = std::find_if(parked_.begin(), parked_.end(), is_settled); at != parked_.end();
       at = std::find_if(parked_.begin(), parked_.end(), is_settled)) {
    const Parked settled = *at;
    parked_.erase(at);
    answer_(settled.guest, settled.seq, roles_->Ask(settled.wish.id, settled.wish.role, {}));
  }
}

void RoleDesk::DeclareOnLoop(const Declare &said) {
  if (roles_ != nullptr) {
    roles_->Declare(said.rank, said.attempt, said.reason);
  }
}

void RoleDesk::DropOnLoop(uint64_t guest) {
  parked_.erase(std::remove_if(parked_.begin(), parked_.end(), [&](const Parked &each) { return each.guest == guest; }),
                parked_.end());
}

}  // namespace datadist
