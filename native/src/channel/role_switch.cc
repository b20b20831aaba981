#include "channel/role_switch.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace datadist {
namespace {

uint32_t Clipped(size_t count) {
  return static_cast<uint32_t>(std::min<size_t>(count, std::numeric_limits<uint32_t>::max()));
}

std::string Named(const RankId &rank) {
  return "rank (pp " + std::to_string(rank.pp_rank) + ", tp " + std::to_string(rank.tp_rank) + ")";
}

}  // namespace

InstanceRole RoleSwitch::role() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return role_;
}

bool RoleSwitch::IsUnderWay() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return phase_ != Phase::kServing;
}

SwitchStatus RoleSwitch::StatusLocked() const {
  SwitchStatus status;
  status.state = phase_ == Phase::kDraining ? SwitchState::kDraining : SwitchState::kApplying;
  status.role = role_;
  status.leases = Clipped(leases_->held().leases);
  status.handoffs = Clipped(handoffs_->unsealed());
  status.taken = Clipped(taken_.load());
  status.ranks = Clipped(waited_for_.size());
  return status;
}

SwitchStatus RoleSwitch::Ask(const SwitchId &id, InstanceRole wanted, std::chrono::milliseconds drain) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (phase_ != Phase::kServing) {
    const bool is_new = std::find(ids_.begin(), ids_.end(), id) == ids_.end();
    if (wanted != wanted_ || (is_new && ids_.size() >= kMostRemembered)) {
      SwitchStatus refused;
      refused.role = role_;
      refused.reason = std::string("it is switching to ") + NameOf(wanted_) + " just now";
      return refused;
    }
    if (is_new) {
      ids_.push_back(id);
    }
    return StatusLocked();
  }
  const auto known = std::find_if(ended_.begin(), ended_.end(), [&](const auto &each) { return each.first == id; });
  if (known != ended_.end()) {
    return known->second;
  }
  ids_ = {id};
  wanted_ = wanted;
  if (wanted == role_) {
    return EndLocked("");
  }
  phase_ = Phase::kDraining;
  deadline_ = now_() + drain;
  duties_.store(InstanceRole::kNone);
  return StatusLocked();
}

// A sealed hand-off is a lease.
bool RoleSwitch::IsDrainedLocked() const {
  return leases_->Standing() == 0 && handoffs_->unsealed() == 0 && taken_.load() == 0;
}

std::optional<RoleOrder> RoleSwitch::Advance() {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Clock::time_point now = now_();
  if (phase_ == Phase::kDraining && (now >= deadline_ || IsDrainedLocked())) {
    may_pull_.store(false);
    handoffs_->EndUnsealed("P changes its role");
    leases_->Revoke(LeaseTable::Revocable::kAll, {}, std::numeric_limits<size_t>::max());
    phase_ = Phase::kApplying;
    deadline_ = now + apply_ + kAnswer;
    return RoleOrder{++attempt_, wanted_, Clipped(static_cast<size_t>(apply_.count()))};
  }
  if (phase_ != Phase::kApplying) {
    return std::nullopt;
  }
  if (!failure_.empty()) {
    EndLocked(std::exchange(failure_, ""));
  } else if (waited_for_.empty()) {
    EndLocked("");
  } else if (now >= deadline_) {
    EndLocked(Named(*waited_for_.begin()) + " has not answered");
  }
  return std::nullopt;
}

void RoleSwitch::Ordered(const RoleOrder &order, std::set<RankId> ranks) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (phase_ == Phase::kApplying && order.attempt == attempt_) {
    waited_for_ = std::move(ranks);
  }
}

void RoleSwitch::Declare(const RankId &rank, uint64_t attempt, const std::string &reason) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (phase_ != Phase::kApplying || attempt != attempt_ || waited_for_.erase(rank) == 0) {
    return;
  }
  if (!reason.empty() && failure_.empty()) {
    failure_ = Named(rank) + ": " + reason;
  }
}

SwitchStatus RoleSwitch::EndLocked(std::string failure) {
  phase_ = Phase::kServing;
  waited_for_.clear();
  if (failure.empty()) {
    role_ = wanted_;
  }
  duties_.store(role_);
  may_pull_.store(Takes(role_));
  SwitchStatus status;
  status.state = failure.empty() ? SwitchState::kDone : SwitchState::kRefused;
  status.role = role_;
  status.reason = std::move(failure);
  for (const SwitchId &id : std::exchange(ids_, {})) {
    if (ended_.size() >= kMostRemembered) {
      ended_.pop_front();
    }
    ended_.emplace_back(id, status);
  }
  return status;
}

}  // namespace datadist
