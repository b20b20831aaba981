// The role of an instance that changes while it serves. Its scheduler asks it what the instance does for others.
//
//   serving ── Ask ──> draining ──┬── nothing is held or pulled ──> applying ──┬── all ranks have done it ──> serving
//     ▲                           └── the time is over: what is     (the ranks │                         (the new role)
//     │                               held is revoked                have an   └── one has not
//     └────────────────────────────────────────────────────────────  order) ───────────┘ (the old role)
//
// Meanwhile it has no duties: nothing new is granted, promised or taken. An idle scheduler takes no steps, so all of this
// goes on without it.
//
// Threads: any; Advance, Ordered and Declare are of whoever gives ranks their orders. No member waits for anything but
// another member, or the tables.
#ifndef DATADIST_CHANNEL_ROLE_SWITCH_H_
#define DATADIST_CHANNEL_ROLE_SWITCH_H_

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "channel/handoff_table.h"
#include "channel/lease_table.h"
#include "channel/role.h"

namespace datadist {

class RoleSwitch {
 public:
  using Clock = LeaseTable::Clock;
  using Now = LeaseTable::Now;

  // Until a rank has answered, beyond what it was given.
  static constexpr std::chrono::milliseconds kAnswer{5'000};
  // Of switches that have ended, and of those who ask for one that is under way.
  static constexpr size_t kMostRemembered = 16;

  // Of the role `both`. `apply`: what a rank is given.
  RoleSwitch(std::shared_ptr<LeaseTable> leases, std::shared_ptr<HandoffTable> handoffs,
             std::chrono::milliseconds apply = std::chrono::seconds(30), Now now = &Clock::now)
      : leases_(std::move(leases)), handoffs_(std::move(handoffs)), apply_(apply), now_(std::move(now)) {}
  RoleSwitch(const RoleSwitch &) = delete;
  RoleSwitch &operator=(const RoleSwitch &) = delete;

  // The scheduler. What may begin now.
  InstanceRole duties() const { return duties_.load(); }
  // Whether a request that was taken may still begin its pull.
  bool may_pull() const { return may_pull_.load(); }
  // Requests that were taken, and are not done.
  void SetTaken(size_t count) { taken_.store(count); }
  InstanceRole role() const;

  // Begins to switch, or says how far that is. By an id that it knows it begins nothing: who hears nothing asks again.
  SwitchStatus Ask(const SwitchId &id, InstanceRole wanted, std::chrono::milliseconds drain);
  bool IsUnderWay() const;

  // What time has brought. An order is for all ranks, once.
  std::optional<RoleOrder> Advance();
  // Who has been given it, and is waited for.
  void Ordered(const RoleOrder &order, std::set<RankId> ranks);
  // Empty `reason`: done.
  void Declare(const RankId &rank, uint64_t attempt, const std::string &reason);

 private:
  enum class Phase : uint8_t { kServing, kDraining, kApplying };
  SwitchStatus StatusLocked() const;
  bool IsDrainedLocked() const;
  SwitchStatus EndLocked(std::string failure);

  const std::shared_ptr<LeaseTable> leases_;
  const std::shared_ptr<HandoffTable> handoffs_;
  const std::chrono::milliseconds apply_;
  const Now now_;

  // Read for every request.
  std::atomic<InstanceRole> duties_{InstanceRole::kBoth};
  std::atomic<bool> may_pull_{true};
  std::atomic<size_t> taken_{0};

  mutable std::mutex mutex_;  // guards all below; taken before those of the tables
  Phase phase_ = Phase::kServing;
  InstanceRole role_ = InstanceRole::kBoth;
  InstanceRole wanted_ = InstanceRole::kBoth;
  std::vector<SwitchId> ids_;                            // by which the switch under way was asked for
  std::deque<std::pair<SwitchId, SwitchStatus>> ended_;  // the oldest first
  Clock::time_point deadline_;                           // of the phase
  uint64_t attempt_ = 0;
  std::set<RankId> waited_for_;
  std::string failure_;
};

}  // namespace datadist

#endif  // DATADIST_CHANNEL_ROLE_SWITCH_H_
