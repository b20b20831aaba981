#include "channel/lease_keeper.h"

#include <sys/epoll.h>

#include <algorithm>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <utility>
#include <variant>
#include <vector>

#include "base/log.h"
#include "base/process_epoch.h"
#include "channel/client.h"
#include "control/doorbell.h"
#include "control/event_loop.h"

namespace datadist {
namespace {

using Clock = LeaseKeeper::Clock;
using Tokens = std::vector<LeaseToken>;

// Three lost renewals in a row do not cost a lease.
constexpr int kRenewalsPerLease = 4;
// However short a lease is said to be.
constexpr std::chrono::milliseconds kShortestPause{10};
// What the hooks of one step have to say goes out together.
constexpr std::chrono::microseconds kGather{1000};
// After a round that found no memory.
constexpr std::chrono::milliseconds kPauseAfterFault{100};
// Leases that have ended, or may have: whoever shares one comes soon.
constexpr size_t kMostRemembered = 1024;
// So many leases are looked at before others get the lock.
constexpr size_t kMostAtOnce = 1024;
static_assert(kMostAtOnce <= kMaxLeasesPerMessage, "what is due at once for one grantor is one message");

}  // namespace

class LeaseKeeper::State {
 public:
  State(std::unique_ptr<ChannelClient> client, std::chrono::milliseconds answer_timeout,
        const LeaseKeeperLimits &limits)
      : client_(std::move(client)),
        answer_timeout_(answer_timeout),
        limits_(limits),
        release_bell_(loop_, limits.release_after) {}

  Status Start();
  bool Hold(const Grantor &grantor, const LeaseToken &token, Clock::duration lease, bool is_news);
  Standing StandingOf(const LeaseToken &token);
  void Pulls(const LeaseToken &token, Clock::duration at_most);
  void Lose(const LeaseToken &token);
  void Release(const LeaseToken &token);
  size_t size() const;
  void Close();
  bool in_forked_child() const { return ProcessEpoch() != epoch_; }

 private:
  struct Kept {
    LeaseKeeper::Grantor grantor;
    Clock::duration lease;
    size_t users;
    bool stands;  // what P said of it last, or by its silence
    Clock::time_point news_at{};
    // When news was asked for that StandingOf has not told yet.
    std::optional<Clock::time_point> asked_at{};
    Clock::time_point next_send{};
    Clock::time_point pulling_until{};
    // Once released: when to retry the release stops being useful, because the lease has run out.
    std::optional<Clock::time_point> give_up{};
    bool is_release_told = false;  // or has been tried
  };

  // What is to be said now, and to whom.
  struct Due {
    std::map<std::pair<LeaseKeeper::Grantor, bool>, Tokens> renewals;  // bool: and it is being pulled
    std::map<LeaseKeeper::Grantor, Tokens> releases;
    std::optional<Clock::time_point> next{};  // when to look again
  };

  using Leases = std::map<LeaseToken, Kept>;
  Leases::iterator FindInUseLocked(const LeaseToken &token);
  void ScheduleLocked(Leases::iterator lease, Clock::time_point at);
  void SendSoonLocked(Leases::iterator lease, Clock::time_point now);
  void ForgetLocked(Leases::iterator lease);

  void RoundOnLoop();
  void LookAgainOnLoop(std::optional<Clock::time_point> at);
  void HearOnLoop(const ChannelAnswer &answer);
  Due TakeDueOnLoop();
  void SendOnLoop(const Grantor &grantor, const Tokens &tokens, const ChannelRequest &request);

  const std::unique_ptr<ChannelClient> client_;
  const std::chrono::milliseconds answer_timeout_;
  const LeaseKeeperLimits limits_;
  const uint64_t epoch_ = ProcessEpoch();
  EventLoop loop_;
  Doorbell doorbell_{loop_, kGather};
  Doorbell release_bell_;
  std::mutex close_mutex_;

  mutable std::mutex mutex_;  // guards up to the next blank line
  Leases leases_;
  std::set<std::pair<Clock::time_point, LeaseToken>> schedule_;  // by Kept::next_send
  std::set<LeaseToken> ended_;
  std::deque<LeaseToken> ended_order_;  // the oldest first

  // Owned by the loop thread.
  std::map<uint64_t, Tokens> sent_;
  uint64_t timer_ = 0;
};

Status LeaseKeeper::State::Start() {
  if (Status status = loop_.Start(); !status.ok()) {
    return status;
  }
  loop_.Post([this] { loop_.WatchOnLoop(client_->event_fd(), EPOLLIN, [this](uint32_t) { RoundOnLoop(); }); });
  const Status status = doorbell_.Install([this] { RoundOnLoop(); });
  return status.ok() ? release_bell_.Install([this] { RoundOnLoop(); }) : status;
}

bool LeaseKeeper::State::Hold(const Grantor &grantor, const LeaseToken &token, Clock::duration lease, bool is_news) {
  const Clock::time_point now = Clock::now();
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto known = FindInUseLocked(token); known != leases_.end()) {
    ++known->second.users;
    return true;
  }
  if (const auto released = leases_.find(token); released != leases_.end()) {
    if (!released->second.is_release_told) {  // it stands as if it had not been released
      released->second.give_up.reset();
      released->second.users = 1;
      released->second.pulling_until = {};
      SendSoonLocked(released, now);
      return true;
    }
    ForgetLocked(released);
  }
  if (leases_.size() >= limits_.leases) {
    return false;
  }
  const bool may_stand = is_news && ended_.count(token) == 0;
  Kept kept{grantor, lease, 1, may_stand};
  if (may_stand) {
    kept.news_at = now;
  } else {
    kept.asked_at = now;
  }
  // Of a request that came late, little of the lease is left.
  SendSoonLocked(leases_.emplace(token, std::move(kept)).first, now);
  return true;
}

LeaseKeeper::Standing LeaseKeeper::State::StandingOf(const LeaseToken &token) {
  const Clock::time_point now = Clock::now();
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto lease = FindInUseLocked(token);
  if (lease == leases_.end()) {
    return Standing::kGone;
  }
  Kept &kept = lease->second;
  if (!kept.asked_at.has_value() && now - kept.news_at >= limits_.news) {
    kept.asked_at = now;
    SendSoonLocked(lease, now);
  }
  if (kept.asked_at.has_value() && *kept.asked_at > kept.news_at) {
    return Standing::kNotKnown;
  }
  // Steps may be further apart than news lasts: what was asked for is told once, however old.
  kept.asked_at.reset();
  return kept.stands ? Standing::kStands : Standing::kGone;
}

void LeaseKeeper::State::Pulls(const LeaseToken &token, Clock::duration at_most) {
  const Clock::time_point now = Clock::now();
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto lease = FindInUseLocked(token); lease != leases_.end()) {
    lease->second.pulling_until = std::max(lease->second.pulling_until, now + at_most);
    SendSoonLocked(lease, now);
  }
}

void LeaseKeeper::State::Lose(const LeaseToken &token) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto lease = leases_.find(token); lease != leases_.end()) {
    ForgetLocked(lease);
  }
}

void LeaseKeeper::State::Release(const LeaseToken &token) {
  const Clock::time_point now = Clock::now();
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto lease = FindInUseLocked(token);
  if (lease == leases_.end() || --lease->second.users > 0) {
    return;
  }
  lease->second.give_up = now + lease->second.lease;
  ScheduleLocked(lease, now + limits_.release_after);
  release_bell_.Ring();
}

size_t LeaseKeeper::State::size() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return leases_.size();
}

void LeaseKeeper::State::Close() {
  const std::lock_guard<std::mutex> one_closer(close_mutex_);
  loop_.Stop();
  client_->Close();
}

// What was released is in nobody's use, and a lease of the same token a new one.
LeaseKeeper::State::Leases::iterator LeaseKeeper::State::FindInUseLocked(const LeaseToken &token) {
  const auto lease = leases_.find(token);
  return lease != leases_.end() && lease->second.give_up.has_value() ? leases_.end() : lease;
}

void LeaseKeeper::State::ScheduleLocked(Leases::iterator lease, Clock::time_point at) {
  schedule_.erase({lease->second.next_send, lease->first});
  lease->second.next_send = at;
  schedule_.emplace(at, lease->first);
}

void LeaseKeeper::State::SendSoonLocked(Leases::iterator lease, Clock::time_point now) {
  ScheduleLocked(lease, now);
  doorbell_.Ring();
}

void LeaseKeeper::State::ForgetLocked(Leases::iterator lease) {
  schedule_.erase({lease->second.next_send, lease->first});
  if (ended_.insert(lease->first).second) {
    ended_order_.push_back(lease->first);
    if (ended_order_.size() > kMostRemembered) {
      ended_.erase(ended_order_.front());
      ended_order_.pop_front();
    }
  }
  leases_.erase(lease);
}

void LeaseKeeper::State::RoundOnLoop() {
  // First: leases go on being renewed though a round finds no memory.
  LookAgainOnLoop(Clock::now() + kPauseAfterFault);
  for (const ChannelAnswer &answer : client_->Take()) {
    HearOnLoop(answer);
  }
  const Due due = TakeDueOnLoop();
  for (const auto &[key, tokens] : due.renewals) {
    const auto &[grantor, pulling] = key;
    SendOnLoop(grantor, tokens, Renew{tokens, pulling});
  }
  for (const auto &[grantor, tokens] : due.releases) {
    SendOnLoop(grantor, tokens, datadist::Release{tokens});
  }
  LookAgainOnLoop(due.next);
}

void LeaseKeeper::State::LookAgainOnLoop(std::optional<Clock::time_point> at) {
  loop_.StopTimerOnLoop(timer_);
  timer_ = at.has_value() ? loop_.StartTimerOnLoop(*at, [this] { RoundOnLoop(); }) : 0;
}

void LeaseKeeper::State::SendOnLoop(const Grantor &grantor, const Tokens &tokens, const ChannelRequest &request) {
  sent_.emplace(client_->Send(grantor.ip, grantor.port, request, answer_timeout_), tokens);
}

LeaseKeeper::State::Due LeaseKeeper::State::TakeDueOnLoop() {
  Due due;
  const Clock::time_point now = Clock::now();
  const std::lock_guard<std::mutex> lock(mutex_);
  for (size_t count = 0; count < kMostAtOnce && !schedule_.empty() && schedule_.begin()->first <= now; ++count) {
    const auto lease = leases_.find(schedule_.begin()->second);
    Kept &kept = lease->second;
    if (!kept.give_up.has_value()) {
      due.renewals[{kept.grantor, kept.pulling_until > now}].push_back(lease->first);
      ScheduleLocked(lease, now + std::max<Clock::duration>(kept.lease / kRenewalsPerLease, kShortestPause));
    } else if (*kept.give_up > now) {
      kept.is_release_told = true;
      due.releases[kept.grantor].push_back(lease->first);
      ScheduleLocked(lease, now + std::max(limits_.release_retry, kShortestPause));
    } else {
      ForgetLocked(lease);
    }
  }
  if (!schedule_.empty()) {
    due.next = schedule_.begin()->first;
  }
  return due;
}

void LeaseKeeper::State::HearOnLoop(const ChannelAnswer &answer) {
  const auto sent = sent_.find(answer.id);
  if (sent == sent_.end()) {
    return;
  }
  const Tokens tokens = std::move(sent->second);
  sent_.erase(sent);
  const auto *const none = std::get_if<NoAnswer>(&answer.answer);
  const auto *const renewed = std::get_if<Renewed>(&answer.answer);
  if (none != nullptr && LogEnabled(LogLevel::kDebug)) {
    Log(LogLevel::kDebug, "lease keeper: " + none->error);
  }
  const Clock::time_point now = Clock::now();
  const std::lock_guard<std::mutex> lock(mutex_);
  // Who has not begun to pull prefills here; a pull will not be confirmed.
  for (const LeaseToken &token : renewed != nullptr ? renewed->gone : Tokens()) {
    if (const auto lease = leases_.find(token); lease != leases_.end()) {
      ForgetLocked(lease);
    }
  }
  const bool is_released = none == nullptr && renewed == nullptr;
  for (const LeaseToken &token : tokens) {
    const auto lease = leases_.find(token);
    if (lease == leases_.end()) {
      continue;
    }
    if (!is_released) {
      // Silence is news only where nothing was known: a busy P may miss a renewal of a lease that stands.
      lease->second.stands = lease->second.stands || renewed != nullptr;
      lease->second.news_at = now;
    } else if (lease->second.give_up.has_value()) {
      ForgetLocked(lease);
    }
  }
}

Result<std::unique_ptr<LeaseKeeper>> LeaseKeeper::Create(uint16_t content_version, const Trust &trust,
                                                         std::chrono::milliseconds answer_timeout,
                                                         const LeaseKeeperLimits &limits) {
  Result<std::unique_ptr<ChannelClient>> client = ChannelClient::Create(content_version, trust);
  if (!client.ok()) {
    return client.status();
  }
  auto state = std::make_unique<State>(std::move(client).value(), answer_timeout, limits);
  if (Status status = state->Start(); !status.ok()) {
    return status;
  }
  return std::unique_ptr<LeaseKeeper>(new LeaseKeeper(std::move(state)));
}

LeaseKeeper::LeaseKeeper(std::unique_ptr<State> state) : state_(std::move(state)) {}

LeaseKeeper::~LeaseKeeper() {
  if (in_forked_child()) {
    // The thread to join exists in the parent only; memory is all there is to lose.
    [[maybe_unused]] auto *const left = state_.release();
    return;
  }
  state_->Close();
}

bool LeaseKeeper::Hold(const Grantor &grantor, const LeaseToken &token, Clock::duration lease, bool is_news) {
  return state_->Hold(grantor, token, lease, is_news);
}
LeaseKeeper::Standing LeaseKeeper::StandingOf(const LeaseToken &token) { return state_->StandingOf(token); }
void LeaseKeeper::Pulls(const LeaseToken &token, Clock::duration at_most) { state_->Pulls(token, at_most); }
void LeaseKeeper::Lose(const LeaseToken &token) { state_->Lose(token); }
void LeaseKeeper::Release(const LeaseToken &token) { state_->Release(token); }
size_t LeaseKeeper::size() const { return state_->size(); }
void LeaseKeeper::Close() { state_->Close(); }
bool LeaseKeeper::in_forked_child() const { return state_->in_forked_child(); }

}  // namespace datadist
