// One comm: its states, all of which the loop owns, and the dials that it retries. See comm_table.h.
//
//   of the comm    Waiting ──its turn──> Preparing ──every pair linked──> Ok
//                                            └──deadline, refusal──> Failed
//   of each other  to come, or between two dials ──> dialled (one at a time) ──> linked
#ifndef DATADIST_COMM_COMM_H_
#define DATADIST_COMM_COMM_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/deadline.h"
#include "base/task_runner.h"
#include "control/address.h"
#include "comm/comm_report.h"
#include "link/link_table.h"

namespace datadist {

struct CommMember {
  uint64_t cluster_id = 0;
  uint32_t rank = 0;
  std::optional<SocketAddress> address;  // where it listens; empty for all members: loopback
};

// What our call says, checked.
struct CommPlan {
  int64_t id = 0;
  std::string name;
  CommMember self;
  std::vector<CommMember> others;
  std::chrono::seconds total_time{0};

  bool loopback() const { return !self.address.has_value(); }
  bool Dials(const CommMember &other) const { return loopback() || other.rank < self.rank; }
  bool listens() const { return !loopback() && others.back().rank > self.rank; }
};

class Comm final : public CommWaiter, public std::enable_shared_from_this<Comm> {
 public:
  // `dials` is where they block. `on_turn_over` runs on the loop once the comm prepares no more.
  Comm(std::shared_ptr<LocalEndpoint> endpoint, std::shared_ptr<LinkTable> table, TaskRunner &dials, CommPlan plan,
       std::function<void()> on_turn_over);

  const std::string &name() const { return plan_.name; }
  bool waiting() const { return phase_ == Phase::kWaiting && !ended_; }
  bool preparing() const { return phase_ == Phase::kPreparing && !ended_; }
  bool ended() const { return ended_; }
  CommReport Report() const;
  bool HasMember(uint64_t cluster_id) const;

  void PrepareOnLoop();
  // From then on no link joins the comm, but by the dial that is under way.
  void EndOnLoop();
  // After EndOnLoop, not on the loop: waits for that dial, then unlinks what is linked, after the transfers that run on
  // it and no later than the deadline.
  void Leave(Deadline deadline) const;

  // CommWaiter
  bool AwaitsOnLoop(uint64_t peer_id) const override;
  void OnPeerLinkedOnLoop(uint64_t peer_id) override;
  void OnPeerRefusedOnLoop(uint64_t peer_id, const Status &why) override;

 private:
  enum class Phase : uint8_t { kWaiting, kPreparing, kOk, kFailed };
  struct Other {
    CommMember member;
    bool linked = false;  // once; the link may be lost by now
    Deadline::Clock::time_point next_try{};
    std::chrono::milliseconds pause;
    std::string why;  // there is no link yet
  };

  void StepOnLoop();
  void LinkNextOnLoop();
  bool DialOnLoop(Other &other);
  void OnDialledOnLoop(Other &other, const Status &status);
  void FailOnLoop(const Status &status);
  void WakeOnLoop(Deadline::Clock::time_point at);

  Other *Find(uint64_t cluster_id);
  bool IsLinked(const Other &other) const;
  std::string Explain() const;
  Status LinkWith(const CommMember &other, Deadline deadline) const;
  std::vector<std::shared_ptr<Link>> Links() const;

  const std::shared_ptr<LocalEndpoint> endpoint_;
  const std::shared_ptr<LinkTable> table_;
  TaskRunner &dials_;
  const CommPlan plan_;
  const std::function<void()> on_turn_over_;

  // Owned by the loop thread; nothing of it changes any more once ended.
  Phase phase_ = Phase::kWaiting;
  bool ended_ = false;
  std::string failure_;
  std::vector<Other> others_;
  Deadline deadline_;
  uint64_t timer_ = 0;
  Other *dialled_ = nullptr;
  std::shared_future<Status> dial_;  // of dialled_; none when not valid
};

}  // namespace datadist

#endif  // DATADIST_COMM_COMM_H_
