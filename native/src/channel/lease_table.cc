#include "channel/lease_table.h"

#include <algorithm>
#include <utility>

#include "base/random.h"

namespace datadist {

const char *ReasonOf(LeaseVerdict verdict) {
  switch (verdict) {
    case LeaseVerdict::kHeld:
      return "";
    case LeaseVerdict::kGone:
      return "the lease has ended or never was";
    case LeaseVerdict::kOtherPrompt:
      return "the lease is for another prompt";
    case LeaseVerdict::kOtherBlocks:
      return "the lease is for other blocks, or for these in another order";
  }
  return "?";
}

Result<LeaseTable::Ticket> LeaseTable::Grant(std::string request_id, const LeaseContent &content, uint64_t num_blocks,
                                             Clock::duration duration) {
  const Result<LeaseToken> token = RandomBytes();
  if (!token.ok()) {
    return token.status();
  }
  const Clock::time_point now = now_();
  const std::lock_guard<std::mutex> lock(mutex_);
  const Ticket ticket{token.value(), ++last_generation_};
  leases_.emplace(ticket.token, Lease{std::move(request_id), ticket.generation, content, num_blocks, duration,
                                      now + duration, now + std::max(duration, limit_)});
  held_blocks_ += num_blocks;
  next_expiry_ = std::min(next_expiry_, now + duration);
  return ticket;
}

LeaseVerdict LeaseTable::Confirm(const LeaseToken &token, uint64_t generation, const LeaseContent &content) {
  const Clock::time_point now = now_();
  const std::lock_guard<std::mutex> lock(mutex_);
  ExpireLocked(now);
  const LeaseVerdict verdict = VerdictLocked(token, generation, content);
  if (verdict != LeaseVerdict::kHeld) {
    ++refused_[static_cast<size_t>(verdict)];
  }
  return verdict;
}

LeaseVerdict LeaseTable::VerdictLocked(const LeaseToken &token, uint64_t generation,
                                       const LeaseContent &content) const {
  const auto lease = leases_.find(token);
  if (lease == leases_.end() || lease->second.generation != generation) {
    return LeaseVerdict::kGone;
  }
  if (lease->second.content.prompt != content.prompt) {
    return LeaseVerdict::kOtherPrompt;
  }
  return lease->second.content.blocks == content.blocks ? LeaseVerdict::kHeld : LeaseVerdict::kOtherBlocks;
}

std::vector<LeaseToken> LeaseTable::Renew(const std::vector<LeaseToken> &tokens) {
  const Clock::time_point now = now_();
  std::vector<LeaseToken> gone;
  const std::lock_guard<std::mutex> lock(mutex_);
  ExpireLocked(now);
  for (const LeaseToken &token : tokens) {
    const auto lease = leases_.find(token);
    if (lease == leases_.end()) {
      gone.push_back(token);
    } else {
      lease->second.expires = std::min(now + lease->second.duration, lease->second.limit);
    }
  }
  return gone;
}

void LeaseTable::Release(const std::vector<LeaseToken> &tokens) {
  const Clock::time_point now = now_();
  const std::lock_guard<std::mutex> lock(mutex_);
  ExpireLocked(now);
  for (const LeaseToken &token : tokens) {
    if (const auto lease = leases_.find(token); lease != leases_.end()) {
      EndLocked(lease, true);
    }
  }
}

std::vector<LeaseTable::Ended> LeaseTable::TakeEnded() {
  const Clock::time_point now = now_();
  const std::lock_guard<std::mutex> lock(mutex_);
  ExpireLocked(now);
  return std::exchange(ended_, {});
}

std::array<uint64_t, kLeaseVerdicts> LeaseTable::TakeRefused() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(refused_, {});
}

LeaseTable::Held LeaseTable::held() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return {leases_.size(), held_blocks_};
}

void LeaseTable::ExpireLocked(Clock::time_point now) {
  if (now < next_expiry_) {
    return;
  }
  next_expiry_ = Clock::time_point::max();
  for (auto lease = leases_.begin(); lease != leases_.end();) {
    if (lease->second.expires <= now) {
      lease = EndLocked(lease, false);
    } else {
      next_expiry_ = std::min(next_expiry_, lease->second.expires);
      ++lease;
    }
  }
}

LeaseTable::Leases::iterator LeaseTable::EndLocked(Leases::iterator lease, bool released) {
  held_blocks_ -= lease->second.num_blocks;
  ended_.push_back({std::move(lease->second.request_id), released});
  return leases_.erase(lease);
}

}  // namespace datadist
