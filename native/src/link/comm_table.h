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
// At most 16 comms prepare at a time, the others wait their turn; each preparation has a thread of its own, which
// Unlink and Stop wake, end and join. Only a dial that is under way keeps them waiting, 2 s at most.
#ifndef DATADIST_LINK_COMM_TABLE_H_
#define DATADIST_LINK_COMM_TABLE_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"
#include "control/address.h"
#include "link/endpoint.h"
#include "link/link_table.h"

namespace datadist {

struct CommMember {
  uint64_t cluster_id = 0;
  uint32_t rank = 0;
  std::optional<SocketAddress> address;  // where it listens; empty for all members: loopback
};

enum class CommState : uint8_t { kOk = 0, kPreparing = 1, kFailed = 2 };

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

  struct Report {
    CommState state = CommState::kPreparing;
    std::string reason;  // why it failed
  };
  // LLM_NOT_YET_LINK: unknown id.
  Result<Report> Query(int64_t comm_id) const;

  // LLM_NOT_YET_LINK while the comm that links us with that cluster is not Ok. Ok for a cluster of no comm.
  Status CheckReady(uint64_t cluster_id) const;
  bool Empty() const;

  // Ends every comm and refuses new ones; the links are left to LinkTable::Shut. Idempotent.
  void Stop();

 private:
  struct State;
  const std::shared_ptr<State> state_;
};

}  // namespace datadist

#endif  // DATADIST_LINK_COMM_TABLE_H_
