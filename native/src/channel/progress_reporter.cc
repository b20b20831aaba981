#include "channel/progress_reporter.h"

#include <sys/epoll.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <utility>
#include <variant>

#include "base/log.h"
#include "base/process_epoch.h"
#include "channel/client.h"
#include "control/doorbell.h"
#include "control/event_loop.h"

namespace datadist {
namespace {

using Clock = EventLoop::Clock;

// Layers that end so close to one another are told of together: a D reads them no sooner.
constexpr std::chrono::microseconds kGatherLayers{200};

}  // namespace

class ProgressReporter::State {
 public:
  State(std::unique_ptr<ChannelClient> client, const RankId &rank, const ReporterLimits &limits)
      : client_(std::move(client)), rank_(rank), limits_(limits) {}

  Status Start();
  Status BeginStep(const Endpoint &endpoint, const HandoffKey &key, const std::vector<Entry> &entries);
  void Layer(size_t index);
  void EndStep();
  size_t size() const;
  void Close();
  bool in_forked_child() const { return ProcessEpoch() != epoch_; }

 private:
  struct Kept {
    ProgressMark mark;     // without the layers of the step, if it is in one
    bool in_step = false;
    uint64_t changed = 0;  // of its mark; the layers of the step have a count of their own
    uint64_t told = 0;     // all changes up to that one have been answered
  };
  using Entries = std::map<LeaseToken, Kept>;
  // One that is on its way.
  struct Sent {
    uint64_t id;
    uint64_t up_to;  // the last change that it tells of
    std::vector<LeaseToken> tokens;
  };
  struct Due {
    Endpoint endpoint;
    ReportProgress report;
    uint64_t up_to;
  };

  bool IsDirtyLocked(const Kept &kept) const {
    return kept.changed > kept.told || (kept.in_step && step_changed_ > kept.told);
  }
  void LeaveStepLocked(bool done);
  void WakeLocked();

  void RoundOnLoop();
  void HearOnLoop(const ChannelAnswer &answer);
  void HeardOnLoop(const Sent &sent);
  void FailedOnLoop(const NoAnswer &why);
  std::optional<Due> TakeDueOnLoop();

  const std::unique_ptr<ChannelClient> client_;
  const RankId rank_;
  const ReporterLimits limits_;
  const uint64_t epoch_ = ProcessEpoch();
  EventLoop loop_;
  Doorbell doorbell_{loop_, kGatherLayers};
  std::mutex close_mutex_;

  mutable std::mutex mutex_;  // guards up to the next blank line
  Endpoint endpoint_;
  HandoffKey key_{};
  Entries entries_;
  bool in_step_ = false;              // one that has entries
  std::vector<uint8_t> step_layers_;  // of all its entries
  uint64_t step_changed_ = 0;
  uint64_t changes_ = 0;
  bool awake_ = false;  // the loop is going to look anyway: when an answer comes, or a pause is over

  // Owned by the loop thread.
  std::optional<Sent> sent_;
  uint64_t pause_timer_ = 0;
  LeaseToken last_told_{};
  std::optional<Clock::time_point> failing_since_;
  bool warned_ = false;
};

Status ProgressReporter::State::Start() {
  if (Status status = loop_.Start(); !status.ok()) {
    return status;
  }
  loop_.Post([this] { loop_.WatchOnLoop(client_->event_fd(), EPOLLIN, [this](uint32_t) { RoundOnLoop(); }); });
  return doorbell_.Install([this] { RoundOnLoop(); });
}

void ProgressReporter::State::WakeLocked() {
  if (!awake_) {
    doorbell_.Ring();
  }
}

// `done`: the device has written what the step computes. Otherwise no more is known than before.
void ProgressReporter::State::LeaveStepLocked(bool done) {
  for (auto entry = entries_.begin(); entry != entries_.end();) {
    Kept &kept = entry->second;
    if (std::exchange(kept.in_step, false)) {
      if (done) {
        kept.mark.base = kept.mark.next;
        kept.changed = changes_;
      } else {
        kept.mark.layers = step_layers_;
        kept.changed = std::max(kept.changed, step_changed_);
      }
    }
    entry = IsDirtyLocked(kept) ? std::next(entry) : entries_.erase(entry);
  }
  step_layers_.clear();
  step_changed_ = 0;
  in_step_ = false;
}

Status ProgressReporter::State::BeginStep(const Endpoint &endpoint, const HandoffKey &key,
                                          const std::vector<Entry> &entries) {
  for (const Entry &entry : entries) {
    if (entry.before > entry.after) {
      return Invalid("a step from " + std::to_string(entry.before) + " back to " + std::to_string(entry.after));
    }
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  LeaveStepLocked(false);
  endpoint_ = endpoint;
  key_ = key;
  ++changes_;
  for (const Entry &entry : entries) {
    if (entries_.size() >= limits_.entries && entries_.count(entry.token) == 0) {
      continue;
    }
    Kept &kept = entries_[entry.token];
    kept.mark = {entry.epoch, entry.before, entry.after, {}};
    kept.in_step = true;
    kept.changed = changes_;
  }
  in_step_ = !entries.empty();
  if (in_step_) {
    WakeLocked();
  }
  return Status::Ok();
}

void ProgressReporter::State::Layer(size_t index) {
  if (index >= 8 * kMaxLayerBytes) {
    return;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!in_step_) {
    return;
  }
  step_layers_.resize(std::max(step_layers_.size(), index / 8 + 1));
  step_layers_[index / 8] |= static_cast<uint8_t>(1U << (index % 8));
  step_changed_ = ++changes_;
  WakeLocked();
}

void ProgressReporter::State::EndStep() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!in_step_) {
    return;
  }
  ++changes_;
  LeaveStepLocked(true);
  WakeLocked();
}

size_t ProgressReporter::State::size() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return entries_.size();
}

void ProgressReporter::State::Close() {
  const std::lock_guard<std::mutex> one_closer(close_mutex_);
  loop_.Stop();
  client_->Close();
}

void ProgressReporter::State::RoundOnLoop() {
  for (const ChannelAnswer &answer : client_->Take()) {
    HearOnLoop(answer);
  }
  if (sent_.has_value() || pause_timer_ != 0) {
    return;
  }
  std::optional<Due> due = TakeDueOnLoop();
  if (!due.has_value()) {
    return;
  }
  Sent sent{0, due->up_to, {}};
  for (const auto &[token, mark] : due->report.marks) {
    sent.tokens.push_back(token);
  }
  last_told_ = sent.tokens.back();
  failing_since_ = failing_since_.value_or(Clock::now());
  sent.id = client_->Send(due->endpoint.ip, due->endpoint.port, due->report, limits_.answer);
  sent_ = std::move(sent);
  const std::lock_guard<std::mutex> lock(mutex_);
  awake_ = true;
}

// The next that have news, after those that were told last: where there are more than a message has room for, all get
// their turn.
std::optional<ProgressReporter::State::Due> ProgressReporter::State::TakeDueOnLoop() {
  const std::lock_guard<std::mutex> lock(mutex_);
  awake_ = false;
  Due due{endpoint_, {key_, rank_, {}}, changes_};
  auto entry = entries_.upper_bound(last_told_);
  for (size_t i = 0; i < entries_.size() && due.report.marks.size() < kMaxMarksPerReport; ++i, ++entry) {
    if (entry == entries_.end()) {
      entry = entries_.begin();
    }
    const Kept &kept = entry->second;
    if (IsDirtyLocked(kept)) {
      ProgressMark &mark = due.report.marks.emplace_back(entry->first, kept.mark).second;
      if (kept.in_step) {
        mark.layers = step_layers_;
      }
    }
  }
  return due.report.marks.empty() ? std::nullopt : std::optional<Due>(std::move(due));
}

void ProgressReporter::State::HearOnLoop(const ChannelAnswer &answer) {
  if (!sent_.has_value() || sent_->id != answer.id) {
    return;
  }
  const Sent sent = *std::exchange(sent_, std::nullopt);
  if (const auto *const none = std::get_if<NoAnswer>(&answer.answer)) {
    FailedOnLoop(*none);
  } else {
    HeardOnLoop(sent);
  }
}

void ProgressReporter::State::HeardOnLoop(const Sent &sent) {
  failing_since_.reset();
  warned_ = false;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const LeaseToken &token : sent.tokens) {
    const auto entry = entries_.find(token);
    if (entry == entries_.end()) {
      continue;
    }
    entry->second.told = sent.up_to;
    if (!entry->second.in_step && !IsDirtyLocked(entry->second)) {
      entries_.erase(entry);
    }
  }
}

void ProgressReporter::State::FailedOnLoop(const NoAnswer &why) {
  pause_timer_ = loop_.StartTimerOnLoop(Clock::now() + limits_.pause, [this] {
    pause_timer_ = 0;
    RoundOnLoop();
  });
  if (Clock::now() - *failing_since_ < limits_.give_up) {
    return;
  }
  if (!std::exchange(warned_, true)) {
    Log(LogLevel::kWarning, "progress of prefills cannot be told, so nobody reads their KV before they end: " + why.error);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  entries_.clear();
}

Result<std::unique_ptr<ProgressReporter>> ProgressReporter::Create(uint16_t content_version, const RankId &rank,
                                                                   const Trust &trust, const ReporterLimits &limits) {
  Result<std::unique_ptr<ChannelClient>> client = ChannelClient::Create(content_version, trust);
  if (!client.ok()) {
    return client.status();
  }
  auto state = std::make_unique<State>(std::move(client).value(), rank, limits);
  if (Status status = state->Start(); !status.ok()) {
    return status;
  }
  return std::unique_ptr<ProgressReporter>(new ProgressReporter(std::move(state)));
}

ProgressReporter::ProgressReporter(std::unique_ptr<State> state) : state_(std::move(state)) {}

ProgressReporter::~ProgressReporter() {
  if (in_forked_child()) {
    // The thread to join exists in the parent only; memory is all there is to lose.
    [[maybe_unused]] auto *const left = state_.release();
    return;
  }
  state_->Close();
}

Status ProgressReporter::BeginStep(const Endpoint &endpoint, const HandoffKey &key, const std::vector<Entry> &entries) {
  return state_->BeginStep(endpoint, key, entries);
}
void ProgressReporter::Layer(size_t index) { state_->Layer(index); }
void ProgressReporter::EndStep() { state_->EndStep(); }
size_t ProgressReporter::size() const { return state_->size(); }
void ProgressReporter::Close() { state_->Close(); }
bool ProgressReporter::in_forked_child() const { return state_->in_forked_child(); }

}  // namespace datadist
