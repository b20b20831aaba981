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
                                             Durations durations, const std::optional<LeaseToken> &promised) {
  const Result<LeaseToken> token = promised.has_value() ? Result<LeaseToken>(*promised) : RandomBytes();
  if (!token.ok()) {
    return token.status();
  }
  const Clock::time_point now = now_();
  const std::lock_guard<std::mutex> lock(mutex_);
  ExpireLocked(now);
  if (leases_.count(token.value()) > 0) {
    return Invalid("a lease of that token is held");
  }
  const Ticket ticket{token.value(), ++last_generation_};
  leases_.emplace(ticket.token,
                  Lease{std::move(request_id), ticket.generation, content, num_blocks, durations.renewed, now,
                        now + durations.claim, now + std::max(durations.renewed, limit_)});
  held_blocks_ += num_blocks;
  ++changes_;
  grants_.emplace(ticket.generation, now);
  next_expiry_ = std::min(next_expiry_, now + durations.claim);
  return ticket;
}

LeaseVerdict LeaseTable::Confirm(const LeaseToken &token, uint64_t generation, const LeaseContent &content,
                                 const std::string &by) {
  const Clock::time_point now = now_();
  const std::lock_guard<std::mutex> lock(mutex_);
  ExpireLocked(now);
  const LeaseVerdict verdict = VerdictLocked(token, generation, content);
  if (verdict != LeaseVerdict::kHeld) {
    ++changes_;
    ++refused_.count;
    if (refused_.first.size() < kMostRefusals) {
      refused_.first.push_back({verdict, RequestOfLocked(token), by});
    }
    return verdict;
  }
  if (Lease &lease = leases_.find(token)->second; !std::exchange(lease.served, true)) {
    ++changes_;
    ++served_.leases;
    served_.blocks += lease.num_blocks;
  }
  return verdict;
}

std::string LeaseTable::RequestOfLocked(const LeaseToken &token) const {
  if (const auto lease = leases_.find(token); lease != leases_.end()) {
    return lease->second.request_id;
  }
  const auto ended = remembered_.find(token);
  return ended == remembered_.end() ? std::string() : ended->second;
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

std::vector<LeaseToken> LeaseTable::Renew(const std::vector<LeaseToken> &tokens, bool pulling, const std::string &by) {
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
      lease->second.claimed = true;
      lease->second.pulling = pulling;
      lease->second.asked_by = by;
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
      EndLocked(lease, End::kReleased);
    }
  }
}

bool LeaseTable::IsRevocable(const Lease &lease, Revocable which) {
  switch (which) {
    case Revocable::kUnclaimed:
      return !lease.claimed;
    case Revocable::kIdle:
      return !lease.pulling;
    case Revocable::kAll:
      return true;
  }
  return false;
}

size_t LeaseTable::Revoke(Revocable which, Clock::duration age, size_t most) {
  const Clock::time_point now = now_();
  const std::lock_guard<std::mutex> lock(mutex_);
  ExpireLocked(now);
  std::vector<Leases::iterator> found;
  for (auto lease = leases_.begin(); lease != leases_.end(); ++lease) {
    if (IsRevocable(lease->second, which) && now - lease->second.granted >= age) {
      found.push_back(lease);
    }
  }
  const size_t count = std::min(most, found.size());
  std::partial_sort(found.begin(), found.begin() + static_cast<std::ptrdiff_t>(count), found.end(),
                    [](const auto &a, const auto &b) { return a->second.generation < b->second.generation; });
  for (size_t i = 0; i < count; ++i) {
    EndLocked(found[i], End::kRevoked);
  }
  return count;
}

bool LeaseTable::RevokeIdle(const LeaseToken &token) {
  const Clock::time_point now = now_();
  const std::lock_guard<std::mutex> lock(mutex_);
  ExpireLocked(now);
  const auto lease = leases_.find(token);
  if (lease == leases_.end() || !IsRevocable(lease->second, Revocable::kIdle)) {
    return false;
  }
  EndLocked(lease, End::kRevoked);
  return true;
}

uint64_t LeaseTable::Changes() {
  const Clock::time_point now = now_();
  const std::lock_guard<std::mutex> lock(mutex_);
  ExpireLocked(now);
  const auto age = std::chrono::duration_cast<std::chrono::seconds>(OldestAgeLocked(now));
  if (std::exchange(told_age_, age) != age) {
    ++changes_;
  }
  return changes_;
}

std::vector<LeaseTable::Ended> LeaseTable::TakeEnded() {
  const Clock::time_point now = now_();
  const std::lock_guard<std::mutex> lock(mutex_);
  ExpireLocked(now);
  return std::exchange(ended_, {});
}

LeaseTable::Refused LeaseTable::TakeRefused() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(refused_, {});
}

LeaseTable::Amount LeaseTable::TakeServed() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(served_, {});
}

LeaseTable::Amount LeaseTable::held() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return {leases_.size(), held_blocks_};
}

size_t LeaseTable::Standing() {
  const Clock::time_point now = now_();
  const std::lock_guard<std::mutex> lock(mutex_);
  ExpireLocked(now);
  return leases_.size();
}

LeaseTable::Clock::duration LeaseTable::OldestAge() const {
  const Clock::time_point now = now_();
  const std::lock_guard<std::mutex> lock(mutex_);
  return OldestAgeLocked(now);
}

LeaseTable::Clock::duration LeaseTable::OldestAgeLocked(Clock::time_point now) const {
  return grants_.empty() ? Clock::duration::zero() : now - grants_.begin()->second;
}

void LeaseTable::ExpireLocked(Clock::time_point now) {
  if (now < next_expiry_) {
    return;
  }
  next_expiry_ = Clock::time_point::max();
  for (auto lease = leases_.begin(); lease != leases_.end();) {
    if (lease->second.expires <= now) {
      lease = EndLocked(lease, lease->second.claimed ? End::kExpired : End::kUnclaimed);
    } else {
      next_expiry_ = std::min(next_expiry_, lease->second.expires);
      ++lease;
    }
  }
}

LeaseTable::Leases::iterator LeaseTable::EndLocked(Leases::iterator lease, End why) {
  ++changes_;
  held_blocks_ -= lease->second.num_blocks;
  grants_.erase(lease->second.generation);
  if (remembered_order_.size() >= kMostRemembered) {
    remembered_.erase(remembered_order_.front());
    remembered_order_.pop_front();
  }
  remembered_.emplace(lease->first, lease->second.request_id);
  remembered_order_.push_back(lease->first);
  ended_.push_back({std::move(lease->second.request_id), why, std::move(lease->second.asked_by)});
  return leases_.erase(lease);
}

}  // namespace datadist
