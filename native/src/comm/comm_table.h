// Bilateral links: every member of a comm makes the same call, and each pair of members becomes a link.
//
//   Link ──> Preparing ──all pairs linked──> Ok ──> Unlink
//                └──deadline, refusal──> Failed ──> Unlink
//
// Of two members the one with the higher rank dials, the other listens at its own address of the rank table; so two
// dials never cross. A member that is not there yet is dialled again until the deadline. Without any address each other
// member is a loopback peer.
//
// The links of a comm stand in the LinkTable like any other; until the comm is Ok they are not to be used (CheckReady).
// A comm that failed or is unlinked takes its links along.
//
// At most 16 comms prepare at a time, the others wait their turn. The loop owns all of it: what is called here runs
// there, and what blocks, a dial, runs on one of a few threads. Only a dial that is under way keeps Unlink and Stop
// waiting, 2 s at most. An address of ours has a listener for as long as a comm uses it; where the endpoint's own
// listener, for clients, has that address, that one serves.
#ifndef DATADIST_COMM_COMM_TABLE_H_
#define DATADIST_COMM_COMM_TABLE_H_

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"
#include "link/acceptor.h"
#include "comm/comm.h"

namespace datadist {

class CommTable {
 public:
  // `max_comms` live at a time.
  CommTable(std::shared_ptr<LocalEndpoint> endpoint, std::shared_ptr<LinkTable> table, uint32_t max_comms);
  ~CommTable();
  CommTable(const CommTable &) = delete;
  CommTable &operator=(const CommTable &) = delete;

  // Where the endpoint's own listener is: a comm with that address uses it. Empty: there is none.
  void SetServerAddress(std::optional<SocketAddress> address);

  // Returns a comm id, counting from 1, at once; `total_time` counts from the comm's turn. LLM_PARAM_INVALID: name not
  // 1..127 bytes or in use by a comm that is not unlinked, not 2..4 members, ranks not ascending, an id twice, our own
  // id not among them, an address here and none there, too many comms. LLM_FAILED: our own address cannot be bound.
  Result<int64_t> Link(const std::string &name, const std::vector<CommMember> &members,
                       std::chrono::seconds total_time);

  // Ends the preparation if need be, and waits for the transfers that run on its links. LLM_NOT_YET_LINK: unknown id.
  Status Unlink(int64_t comm_id);

  using Report = CommReport;
  // LLM_NOT_YET_LINK: unknown id.
  Result<Report> Query(int64_t comm_id) const;

  // LLM_NOT_YET_LINK while the comm that links us with that cluster is not Ok. Ok for a cluster of no comm.
  Status CheckReady(uint64_t cluster_id) const;
  bool Empty() const;

  // Ends every comm and refuses new ones; the links are left to LinkTable::Shut. Idempotent.
  void Stop();

 private:
  struct Entry {
    std::shared_ptr<Comm> comm;
    std::shared_ptr<void> listener;  // open for as long as anybody holds it; empty where none is needed
  };
  std::shared_ptr<Comm> FindByNameOnLoop(const std::string &name) const;
  std::shared_ptr<Comm> FindOnLoop(int64_t comm_id) const;
  Status CheckRoomOnLoop(const std::string &name) const;
  Result<int64_t> LinkOnLoop(CommPlan plan);
  void PrepareNextOnLoop();
  Status CheckReadyOnLoop(uint64_t cluster_id, datadist::Link *link) const;
  Result<std::shared_ptr<void>> ListenOnLoop(const SocketAddress &address);

  const std::shared_ptr<LocalEndpoint> endpoint_;
  const std::shared_ptr<LinkTable> table_;
  const uint32_t max_comms_;
  TaskRunner runner_;

  // Owned by the loop thread.
  std::optional<SocketAddress> server_address_;
  std::map<std::string, std::weak_ptr<void>> listeners_;
  std::map<int64_t, Entry> comms_;
  int64_t last_id_ = 0;
  bool stopped_ = false;
};

}  // namespace datadist

#endif  // DATADIST_COMM_COMM_TABLE_H_
