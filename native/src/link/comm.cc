#include "link/comm.h"

#include <algorithm>
#include <system_error>
#include <utility>

#include "base/log.h"
#include "link/client_handshake.h"
#include "link/loopback.h"

namespace datadist {
namespace {

using llm_datadist::LLM_ALREADY_LINK;
using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_LINK_FAILED;
using llm_datadist::LLM_NOT_YET_LINK;
using llm_datadist::LLM_PROCESSING_LINK;
using llm_datadist::LLM_TIMEOUT;

constexpr uint32_t kMaxPreparing = 16;
// So that one member that accepts and then says nothing does not use up the time of the others.
constexpr std::chrono::milliseconds kAttemptTime{2000};
// Between two rounds of dials: members usually start within moments of each other, late ones within seconds.
constexpr std::chrono::milliseconds kFirstPause{20};
constexpr std::chrono::milliseconds kLongestPause{100};

// What passes by itself when the member arrives, recovers, or makes its own call.
bool MayPass(const Status &status) {
  return status.code() == LLM_LINK_FAILED || status.code() == LLM_TIMEOUT || status.code() == LLM_NOT_YET_LINK ||
         status.code() == LLM_PROCESSING_LINK;
}

}  // namespace

// ---- PreparationSlots ----

bool PreparationSlots::Take(const std::atomic<bool> &cancelled) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return cancelled.load() || used_ < kMaxPreparing; });
  if (cancelled.load()) {
    return false;
  }
  ++used_;
  return true;
}

void PreparationSlots::Give() {
  const std::lock_guard<std::mutex> lock(mutex_);
  --used_;
  changed_.notify_all();
}

void PreparationSlots::WakeCancelled() {
  const std::lock_guard<std::mutex> lock(mutex_);
  changed_.notify_all();
}

// ---- Comm ----

Comm::Comm(std::shared_ptr<LocalEndpoint> endpoint, std::shared_ptr<LinkTable> table, PreparationSlots &slots,
           CommPlan plan)
    : endpoint_(std::move(endpoint)), table_(std::move(table)), slots_(slots), plan_(std::move(plan)) {}

Comm::~Comm() { End(); }

Status Comm::Start() {
  std::set<uint64_t> peer_ids;
  for (const CommMember &other : plan_.others) {
    peer_ids.insert(other.cluster_id);
  }
  // Before the thread has its turn: members that dial us need not wait for that.
  table_->expected_comms().Expect(plan_.name, std::move(peer_ids), weak_from_this());
  try {
    thread_ = std::thread([this] { Prepare(); });
  } catch (const std::system_error &error) {
    table_->expected_comms().Forget(plan_.name);
    return Status(LLM_FAILED, "no thread to prepare comm '" + plan_.name + "': " + error.what());
  }
  return Status::Ok();
}

void Comm::Cancel() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ending_.store(true);
    changed_.notify_all();
  }
  slots_.WakeCancelled();
}

void Comm::End() {
  Cancel();
  const std::lock_guard<std::mutex> lock(end_mutex_);
  if (thread_.joinable()) {
    thread_.join();
  }
}

bool Comm::HasMember(uint64_t cluster_id) const {
  return std::any_of(plan_.others.begin(), plan_.others.end(),
                     [&](const CommMember &other) { return other.cluster_id == cluster_id; });
}

CommTable::Report Comm::report() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return report_;
}

void Comm::OnPeerLinkedOnLoop(uint64_t peer_id) { NoteLinked(peer_id); }

void Comm::OnPeerRefusedOnLoop(uint64_t peer_id, const Status &why) {
  NoteFailure(peer_id, "refused by us: " + why.text());
}

void Comm::NoteLinked(uint64_t peer_id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  linked_.insert(peer_id);
  ++links_made_;
  changed_.notify_all();
}

uint64_t Comm::links_made() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return links_made_;
}

void Comm::NoteFailure(uint64_t peer_id, const std::string &why) {
  const std::lock_guard<std::mutex> lock(mutex_);
  last_why_[peer_id] = why;
}

bool Comm::HasFailed(uint64_t peer_id) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return last_why_.count(peer_id) != 0;
}

// ---- preparation ----

void Comm::Prepare() {
  Status status(LLM_FAILED, "ended before its turn");
  if (slots_.Take(ending_)) {
    try {
      status = LinkAll(Deadline::In(plan_.total_time));
    } catch (const std::exception &error) {
      status = Status(LLM_FAILED, error.what());
    }
    slots_.Give();
  }
  if (status.ok()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    report_.state = CommState::kOk;
  }
  // Who comes now comes for a later comm of that name, which we do not know yet.
  table_->expected_comms().Forget(plan_.name);
  if (status.ok() || ending_.load()) {
    return;
  }
  Log(LogLevel::kWarning, "comm '" + plan_.name + "' failed: " + status.text());
  DropLinks(Deadline::In(std::chrono::milliseconds::zero()));
  const std::lock_guard<std::mutex> lock(mutex_);
  report_ = CommTable::Report{CommState::kFailed, status.text()};
}

Status Comm::LinkAll(Deadline deadline) {
  std::chrono::milliseconds pause = kFirstPause;
  while (!ending_.load()) {
    if (Status status = DialMissing(Missing(), deadline); !status.ok()) {
      return status;
    }
    const uint64_t seen = links_made();  // before the look at what is missing, so that no later link goes unnoticed
    const std::vector<CommMember> missing = Missing();
    if (missing.empty()) {
      return Status::Ok();
    }
    if (deadline.Expired()) {
      return Status(LLM_TIMEOUT, Explain(missing));
    }
    // Who only waits to be dialled is woken by that.
    const bool dials = std::any_of(missing.begin(), missing.end(),
                                   [this](const CommMember &other) { return plan_.Dials(other); });
    const Deadline until = dials ? Deadline::Earlier(deadline, Deadline::In(pause)) : deadline;
    pause = std::min(pause * 2, kLongestPause);
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_until(lock, until.at(), [&] { return ending_.load() || links_made_ != seen; });
  }
  return Status(LLM_FAILED, "unlinked while it was being prepared");
}

// Not ok: a reason that no waiting removes.
Status Comm::DialMissing(const std::vector<CommMember> &missing, Deadline deadline) {
  for (const CommMember &other : missing) {
    if (!plan_.Dials(other) || ending_.load()) {
      continue;
    }
    const Status status = LinkWith(other, Deadline::Earlier(deadline, Deadline::In(kAttemptTime)));
    if (status.ok()) {
      NoteLinked(other.cluster_id);
      continue;
    }
    if (!MayPass(status)) {
      return Status(status.code(), "cluster " + std::to_string(other.cluster_id) + ": " + status.text());
    }
    // A dial that was cut short by the end of the time says less than the one before it.
    if (!deadline.Expired() || !HasFailed(other.cluster_id)) {
      NoteFailure(other.cluster_id, status.text());
    }
  }
  return Status::Ok();
}

Status Comm::LinkWith(const CommMember &other, Deadline deadline) {
  if (plan_.loopback()) {
    return LinkByLoopback(other);
  }
  return DialLink(endpoint_, table_, DialTarget{*other.address, other.cluster_id, plan_.name, plan_.id}, deadline);
}

Status Comm::LinkByLoopback(const CommMember &other) {
  if (table_->HasLive(other.cluster_id)) {
    return Status(LLM_ALREADY_LINK, "linked already");
  }
  const Result<LinkTable::Reservation> reservation = table_->ReserveDial(other.cluster_id);
  if (!reservation.ok()) {
    return reservation.status();
  }
  const Result<std::shared_ptr<Link>> link =
      MakeLoopback(endpoint_, table_, LoopbackPeer{other.cluster_id, other.cluster_id, "loopback", plan_.name});
  return link.ok() ? table_->Adopt(link.value()) : link.status();
}

std::vector<CommMember> Comm::Missing() const {
  std::set<uint64_t> linked;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    linked = linked_;
  }
  std::vector<CommMember> missing;
  for (const CommMember &other : plan_.others) {
    const std::shared_ptr<Link> link = table_->Find(other.cluster_id);
    const bool ours = link != nullptr && link->comm_name() == plan_.name;
    // A link that was made and is gone: its peer has seen the comm complete and unlinked it already.
    if (ours ? !link->alive() : linked.count(other.cluster_id) == 0) {
      missing.push_back(other);
    }
  }
  return missing;
}

std::string Comm::Explain(const std::vector<CommMember> &missing) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::string text = "not linked within " + std::to_string(plan_.total_time.count()) + " s:";
  for (const CommMember &other : missing) {
    const auto why = last_why_.find(other.cluster_id);
    text += " cluster " + std::to_string(other.cluster_id) + " (rank " + std::to_string(other.rank) + "): " +
            (why != last_why_.end() ? why->second : "it never linked to us") + ";";
  }
  text.pop_back();
  return text;
}

// ---- the end ----

void Comm::DropLinks(Deadline deadline) {
  // A link that was being accepted when the comm was forgotten is in the table once the loop comes round.
  endpoint_->loop()->Run([] {});
  const bool complete = report().state == CommState::kOk;
  for (const CommMember &other : plan_.others) {
    const std::shared_ptr<Link> link = table_->Find(other.cluster_id);
    if (link == nullptr || link->comm_name() != plan_.name) {
      continue;
    }
    if (complete && link->alive()) {
      if (const Status status = link->Unlink(deadline); !status.ok()) {
        Log(LogLevel::kWarning, "comm '" + plan_.name + "': " + status.text());
      }
    }
    table_->Remove(link.get());
    link->CloseWhenIdle(deadline, "its comm '" + plan_.name + "' was unlinked");
    link->WaitUntilServed();
  }
}

}  // namespace datadist
