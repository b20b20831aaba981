// One comm: the preparation of its links on a thread of its own, and what became of it. See comm_table.h.
#ifndef DATADIST_LINK_COMM_H_
#define DATADIST_LINK_COMM_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "base/deadline.h"
#include "link/comm_table.h"
#include "link/expected_comms.h"

namespace datadist {

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

// How many comms prepare at a time.
class PreparationSlots {
 public:
  // Waits for a slot: those that have one give it back at their deadline. False when `cancelled` became true.
  bool Take(const std::atomic<bool> &cancelled);
  void Give();
  void WakeCancelled();

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  uint32_t used_ = 0;  // guarded by mutex_
};

class Comm final : public CommWaiter, public std::enable_shared_from_this<Comm> {
 public:
  Comm(std::shared_ptr<LocalEndpoint> endpoint, std::shared_ptr<LinkTable> table, PreparationSlots &slots,
       CommPlan plan);
  ~Comm() override;
  Comm(const Comm &) = delete;
  Comm &operator=(const Comm &) = delete;

  // Begins to prepare. LLM_FAILED: no thread to be had.
  Status Start();
  // Tells the preparation, if it still runs, to end.
  void Cancel();
  // Cancels and joins it; from then on no link joins the comm. Idempotent.
  void End();
  // After End: unlinks what was linked, after the transfers that run on it and no later than the deadline. What was
  // linked in vain, because others were not, is just closed: for its peers it is lost, so that they may come again.
  void DropLinks(Deadline deadline);

  const std::string &name() const { return plan_.name; }
  bool HasMember(uint64_t cluster_id) const;
  CommTable::Report report() const;

  // CommWaiter
  void OnPeerLinkedOnLoop(uint64_t peer_id) override;
  void OnPeerRefusedOnLoop(uint64_t peer_id, const Status &why) override;

 private:
  void Prepare();
  Status LinkAll(Deadline deadline);
  Status DialMissing(const std::vector<CommMember> &missing, Deadline deadline);
  Status LinkWith(const CommMember &other, Deadline deadline);
  Status LinkByLoopback(const CommMember &other);
  std::vector<CommMember> Missing() const;
  std::string Explain(const std::vector<CommMember> &missing) const;
  void NoteLinked(uint64_t peer_id);
  void NoteFailure(uint64_t peer_id, const std::string &why);
  bool HasFailed(uint64_t peer_id) const;
  uint64_t links_made() const;

  const std::shared_ptr<LocalEndpoint> endpoint_;
  const std::shared_ptr<LinkTable> table_;
  PreparationSlots &slots_;
  const CommPlan plan_;
  std::atomic<bool> ending_{false};
  std::mutex end_mutex_;  // one End at a time joins
  std::thread thread_;    // guarded by end_mutex_ once started

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  uint64_t links_made_ = 0;                   // a count; guarded by mutex_
  std::set<uint64_t> linked_;                 // peers that were linked once; guarded by mutex_
  std::map<uint64_t, std::string> last_why_;  // why there is no link yet, by peer; guarded by mutex_
  CommTable::Report report_;                  // guarded by mutex_
};

}  // namespace datadist

#endif  // DATADIST_LINK_COMM_H_
