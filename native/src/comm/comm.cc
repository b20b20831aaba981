#include "comm/comm.h"

#include <algorithm>
#include <exception>
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
using Clock = Deadline::Clock;

// So that one member that accepts and then says nothing does not use up the time of the others.
constexpr std::chrono::milliseconds kAttemptTime{2000};
// Between two dials: members usually start within moments of each other, late ones within seconds.
constexpr std::chrono::milliseconds kFirstPause{20};
constexpr std::chrono::milliseconds kLongestPause{100};

// What passes by itself when the member arrives, recovers, or makes its own call.
bool MayPass(const Status &status) {
  return status.code() == LLM_LINK_FAILED || status.code() == LLM_TIMEOUT || status.code() == LLM_NOT_YET_LINK ||
         status.code() == LLM_PROCESSING_LINK;
}

std::string NameOf(const CommMember &member) { return "cluster " + std::to_string(member.cluster_id); }

}  // namespace

Comm::Comm(std::shared_ptr<LocalEndpoint> endpoint, std::shared_ptr<LinkTable> table, TaskRunner &dials,
           CommPlan plan, std::function<void()> on_turn_over)
    : endpoint_(std::move(endpoint)),
      table_(std::move(table)),
      dials_(dials),
      plan_(std::move(plan)),
      on_turn_over_(std::move(on_turn_over)),
      deadline_(Deadline::In(plan_.total_time)) {
  for (const CommMember &member : plan_.others) {
    others_.push_back(Other{member, false, {}, kFirstPause, ""});
  }
}

CommReport Comm::Report() const {
  if (phase_ == Phase::kFailed) {
    return {CommState::kFailed, failure_};
  }
  return {phase_ == Phase::kOk ? CommState::kOk : CommState::kPreparing, ""};
}

bool Comm::HasMember(uint64_t cluster_id) const {
  return std::any_of(plan_.others.begin(), plan_.others.end(),
                     [&](const CommMember &other) { return other.cluster_id == cluster_id; });
}

Comm::Other *Comm::Find(uint64_t cluster_id) {
  const auto it = std::find_if(others_.begin(), others_.end(),
                               [&](const Other &other) { return other.member.cluster_id == cluster_id; });
  return it == others_.end() ? nullptr : &*it;
}

bool Comm::AwaitsOnLoop(uint64_t peer_id) const {
  return std::any_of(others_.begin(), others_.end(), [&](const Other &other) {
    return other.member.cluster_id == peer_id && !other.linked;
  });
}

void Comm::OnPeerLinkedOnLoop(uint64_t peer_id) {
  if (Other *const other = Find(peer_id)) {
    other->linked = true;
    StepOnLoop();
  }
}

void Comm::OnPeerRefusedOnLoop(uint64_t peer_id, const Status &why) {
  if (Other *const other = Find(peer_id)) {
    other->why = "refused by us: " + why.text();
  }
}

void Comm::PrepareOnLoop() {
  phase_ = Phase::kPreparing;
  deadline_ = Deadline::In(plan_.total_time);
  StepOnLoop();
}

void Comm::EndOnLoop() {
  const bool had_turn = preparing();
  ended_ = true;
  endpoint_->loop()->StopTimerOnLoop(timer_);
  if (had_turn) {
    on_turn_over_();
  }
}

void Comm::Leave(Deadline deadline) const {
  if (dial_.valid()) {
    dial_.wait();
  }
  for (const std::shared_ptr<Link> &link : Links()) {
    if (phase_ == Phase::kOk && link->alive()) {
      if (const Status status = link->Unlink(deadline); !status.ok()) {
        Log(LogLevel::kWarning, "comm '" + plan_.name + "': " + status.text());
      }
    }
    table_->Remove(link.get());
    link->CloseWhenIdle(deadline, "its comm '" + plan_.name + "' was unlinked");
    link->WaitUntilServed();
  }
}

// ---- steps on the loop ----

void Comm::StepOnLoop() try {
  if (!preparing()) {
    return;
  }
  endpoint_->loop()->StopTimerOnLoop(timer_);
  if (dial_.valid()) {
    if (dial_.wait_for(std::chrono::seconds(0)) != std::future_status::ready) {
      WakeOnLoop(Clock::now() + kLongestPause);
      return;
    }
    OnDialledOnLoop(*dialled_, std::exchange(dial_, {}).get());
  }
  if (phase_ == Phase::kPreparing) {
    LinkNextOnLoop();
  }
} catch (const std::exception &error) {
  // No memory to go on. What is linked goes when the comm is unlinked.
  if (std::exchange(phase_, Phase::kFailed) == Phase::kPreparing) {
    on_turn_over_();
  }
  failure_ = error.what();
}

void Comm::LinkNextOnLoop() {
  bool complete = true;
  Other *next = nullptr;  // who has waited longest to be dialled, so that none keeps the others from their turn
  for (Other &other : others_) {
    if (IsLinked(other)) {
      continue;
    }
    complete = false;
    if (plan_.Dials(other.member) && (next == nullptr || other.next_try < next->next_try)) {
      next = &other;
    }
  }
  if (complete) {
    phase_ = Phase::kOk;
    on_turn_over_();
  } else if (deadline_.Expired()) {
    FailOnLoop(Status(LLM_TIMEOUT, Explain()));
  } else if (next == nullptr || next->next_try > Clock::now()) {
    WakeOnLoop(next == nullptr ? deadline_.at() : std::min(next->next_try, deadline_.at()));
  } else if (!DialOnLoop(*next)) {
    FailOnLoop(Status(LLM_FAILED, "no thread to dial " + NameOf(next->member)));
  }
}

// False: there is no thread for it. What it throws, OnDialled meets.
bool Comm::DialOnLoop(Other &other) {
  const Deadline until = Deadline::Earlier(deadline_, Deadline::In(kAttemptTime));
  const auto dial = std::make_shared<std::packaged_task<Status()>>(
      [this, &member = other.member, until] { return LinkWith(member, until); });
  WakeOnLoop(until.at() + kLongestPause);  // that it is over may be said in vain, for want of memory
  dialled_ = &other;
  dial_ = dial->get_future().share();
  return dials_.Post([dial, self = shared_from_this()] {
    (*dial)();
    self->endpoint_->loop()->Post([self] { self->StepOnLoop(); });
  });
}

void Comm::OnDialledOnLoop(Other &other, const Status &status) {
  if (status.ok()) {
    other.linked = true;
    return;
  }
  if (!MayPass(status)) {
    FailOnLoop(Status(status.code(), NameOf(other.member) + ": " + status.text()));
    return;
  }
  // A dial that was cut short by the end of the time says less than the one before it.
  if (!deadline_.Expired() || other.why.empty()) {
    other.why = status.text();
  }
  other.next_try = Clock::now() + other.pause;
  other.pause = std::min(other.pause * 2, kLongestPause);
}

// What was linked in vain, because others were not, is just closed: for its peers it is lost, so that they may come
// again.
void Comm::FailOnLoop(const Status &status) {
  phase_ = Phase::kFailed;
  on_turn_over_();
  failure_ = status.text();
  Log(LogLevel::kWarning, "comm '" + plan_.name + "' failed: " + failure_);
  for (const std::shared_ptr<Link> &link : Links()) {
    table_->Remove(link.get());
    link->Close("its comm '" + plan_.name + "' failed");
  }
}

void Comm::WakeOnLoop(Clock::time_point at) {
  timer_ = endpoint_->loop()->StartTimerOnLoop(at, [self = shared_from_this()] { self->StepOnLoop(); });
}

bool Comm::IsLinked(const Other &other) const {
  const std::shared_ptr<Link> link = table_->Find(other.member.cluster_id);
  const bool ours = link != nullptr && link->comm_name() == plan_.name;
  // A link that was made and is gone: its peer has seen the comm complete and unlinked it already.
  return ours ? link->alive() : other.linked;
}

std::string Comm::Explain() const {
  std::string text = "not linked within " + std::to_string(plan_.total_time.count()) + " s:";
  const char *separator = " ";
  for (const Other &other : others_) {
    if (!IsLinked(other)) {
      const char *const silent = plan_.Dials(other.member) ? "its turn never came" : "it never linked to us";
      text += std::exchange(separator, "; ") + NameOf(other.member) + " (rank " + std::to_string(other.member.rank) +
              "): " + (other.why.empty() ? silent : other.why);
    }
  }
  return text;
}

std::vector<std::shared_ptr<Link>> Comm::Links() const {
  std::vector<std::shared_ptr<Link>> links;
  for (const CommMember &other : plan_.others) {
    std::shared_ptr<Link> link = table_->Find(other.cluster_id);
    if (link != nullptr && link->comm_name() == plan_.name) {
      links.push_back(std::move(link));
    }
  }
  return links;
}

// On a thread of the dials.
Status Comm::LinkWith(const CommMember &other, Deadline deadline) const {
  if (!plan_.loopback()) {
    return DialLink(endpoint_, table_, DialTarget{*other.address, other.cluster_id, plan_.name, plan_.id}, deadline);
  }
  if (table_->HasLive(other.cluster_id)) {
    return Status(LLM_ALREADY_LINK, "linked already");
  }
  const Result<LinkTable::Reservation> reservation = table_->ReserveDial(other.cluster_id);
  const LoopbackPeer peer{other.cluster_id, other.cluster_id, "loopback", plan_.name};
  return reservation.ok() ? LinkLoopback(endpoint_, table_, peer) : reservation.status();
}

}  // namespace datadist
