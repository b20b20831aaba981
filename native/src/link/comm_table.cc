#include "link/comm_table.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "link/comm.h"
#include "link/comm_listeners.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_NOT_YET_LINK;

constexpr size_t kMaxNameBytes = 127;
constexpr size_t kMinMembers = 2;
constexpr size_t kMaxMembers = 4;
// A time that adds to the clock without overflow, and outlasts everything.
constexpr std::chrono::seconds kLongestTime{366 * 24 * 3600};

Status CheckName(const std::string &name) {
  if (name.empty() || name.size() > kMaxNameBytes) {
    return Invalid("comm_name: " + std::to_string(name.size()) + " bytes, allowed: 1.." +
                   std::to_string(kMaxNameBytes));
  }
  return Status::Ok();
}

Status CheckMembers(const std::vector<CommMember> &members) {
  if (members.size() < kMinMembers || members.size() > kMaxMembers) {
    return Invalid("members: " + std::to_string(members.size()) + ", allowed: " + std::to_string(kMinMembers) + ".." +
                   std::to_string(kMaxMembers));
  }
  std::set<uint64_t> seen;
  for (size_t i = 0; i < members.size(); ++i) {
    const CommMember &member = members[i];
    const std::string who = "members[" + std::to_string(i) + "]";
    if (!seen.insert(member.cluster_id).second) {
      return Invalid(who + ".cluster_id: " + std::to_string(member.cluster_id) + " comes twice");
    }
    if (i > 0 && member.rank <= members[i - 1].rank) {
      return Invalid(who + ".rank: " + std::to_string(member.rank) + " after " + std::to_string(members[i - 1].rank) +
                     ", allowed: ascending");
    }
    if (member.address.has_value() != members[0].address.has_value()) {
      return Invalid(who + ".address: either every member has one, or none");
    }
    if (member.address.has_value() && member.address->port() == 0) {
      return Invalid(who + ".address: " + member.address->ToString() + ", allowed: a port above 0");
    }
  }
  return Status::Ok();
}

Result<CommPlan> MakePlan(const std::string &name, const std::vector<CommMember> &members, uint64_t own_id,
                          std::chrono::seconds total_time) {
  for (const Status &status : {CheckName(name), CheckMembers(members)}) {
    if (!status.ok()) {
      return status;
    }
  }
  CommPlan plan;
  plan.name = name;
  plan.total_time = std::min(total_time, kLongestTime);
  bool found = false;
  for (const CommMember &member : members) {
    if (member.cluster_id == own_id) {
      plan.self = member;
      found = true;
    } else {
      plan.others.push_back(member);
    }
  }
  return found ? Result<CommPlan>(std::move(plan))
               : Result<CommPlan>(Invalid("members: our own cluster id " + std::to_string(own_id) + " is missing"));
}

Status NotReady(const Comm &comm, uint64_t cluster_id) {
  const CommTable::Report report = comm.report();
  const std::string where = "cluster " + std::to_string(cluster_id) + ": comm '" + comm.name() + "' ";
  switch (report.state) {
    case CommState::kOk:
      return Status::Ok();
    case CommState::kPreparing:
      return Status(LLM_NOT_YET_LINK, where + "is still being prepared");
    case CommState::kFailed:
      return Status(LLM_NOT_YET_LINK, where + "failed: " + report.reason);
  }
  return Status(LLM_FAILED, where);
}

}  // namespace

struct CommTable::State {
  struct Entry {
    std::shared_ptr<Comm> comm;
    CommListeners::Lease lease;
    bool ending = false;  // by an Unlink, which will erase it
  };

  State(std::shared_ptr<LocalEndpoint> local, std::shared_ptr<LinkTable> links, uint32_t most)
      : endpoint(std::move(local)), table(std::move(links)), max_comms(most), listeners(endpoint, table) {}

  Status CheckRoomLocked(const std::string &name) const;
  const Comm *FindByNameLocked(const std::string &name) const;

  const std::shared_ptr<LocalEndpoint> endpoint;
  const std::shared_ptr<LinkTable> table;
  const uint32_t max_comms;
  PreparationSlots slots;
  CommListeners listeners;

  mutable std::mutex mutex;
  std::map<int64_t, Entry> comms;  // guarded by mutex
  int64_t last_id = 0;             // guarded by mutex
  bool stopped = false;            // guarded by mutex
};

const Comm *CommTable::State::FindByNameLocked(const std::string &name) const {
  const auto it = std::find_if(comms.begin(), comms.end(),
                               [&](const auto &entry) { return entry.second.comm->name() == name; });
  return it == comms.end() ? nullptr : it->second.comm.get();
}

Status CommTable::State::CheckRoomLocked(const std::string &name) const {
  if (stopped) {
    return Status(LLM_FAILED, "finalized");
  }
  if (FindByNameLocked(name) != nullptr) {
    return Invalid("comm_name: '" + name + "' is in use, unlink that comm first");
  }
  if (comms.size() >= max_comms) {
    return Invalid("comm '" + name + "': " + std::to_string(comms.size()) + " comms exist, at most " +
                   std::to_string(max_comms));
  }
  return Status::Ok();
}

CommTable::CommTable(std::shared_ptr<LocalEndpoint> endpoint, std::shared_ptr<LinkTable> table, uint32_t max_comms)
    : state_(std::make_shared<State>(std::move(endpoint), std::move(table), max_comms)) {}

CommTable::~CommTable() { Stop(); }

void CommTable::SetServerAddress(std::optional<SocketAddress> address) {
  state_->listeners.SetServerAddress(std::move(address));
}

Result<int64_t> CommTable::Link(const std::string &name, const std::vector<CommMember> &members,
                                std::chrono::seconds total_time) {
  Result<CommPlan> plan = MakePlan(name, members, state_->endpoint->cluster_id(), total_time);
  if (!plan.ok()) {
    return plan.status();
  }
  const std::lock_guard<std::mutex> lock(state_->mutex);
  if (Status status = state_->CheckRoomLocked(name); !status.ok()) {
    return status;
  }
  CommListeners::Lease lease;
  if (plan.value().listens()) {
    Result<CommListeners::Lease> opened = state_->listeners.Open(*plan.value().self.address);
    if (!opened.ok()) {
      return Status(opened.status().code(), "comm '" + name + "': " + opened.status().text());
    }
    lease = std::move(opened).value();
  }
  plan.value().id = state_->last_id + 1;
  const auto comm = std::make_shared<Comm>(state_->endpoint, state_->table, state_->slots, std::move(plan).value());
  if (Status status = comm->Start(); !status.ok()) {
    return status;
  }
  state_->comms[++state_->last_id] = State::Entry{comm, std::move(lease), false};
  return state_->last_id;
}

Status CommTable::Unlink(int64_t comm_id) {
  std::shared_ptr<Comm> comm;
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    const auto it = state_->comms.find(comm_id);
    if (it == state_->comms.end() || it->second.ending) {
      return Status(LLM_NOT_YET_LINK, "comm_id: " + std::to_string(comm_id) + " is not linked");
    }
    it->second.ending = true;
    comm = it->second.comm;
  }
  comm->End();
  // Transfers end by their own deadlines, which are sooner.
  comm->DropLinks(Deadline::In(state_->endpoint->MaxPeerHold()));
  const std::lock_guard<std::mutex> lock(state_->mutex);
  state_->comms.erase(comm_id);
  return Status::Ok();
}

Result<CommTable::Report> CommTable::Query(int64_t comm_id) const {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  const auto it = state_->comms.find(comm_id);
  if (it == state_->comms.end() || it->second.ending) {
    return Status(LLM_NOT_YET_LINK, "comm_id: " + std::to_string(comm_id) + " is not linked");
  }
  return it->second.comm->report();
}

Status CommTable::CheckReady(uint64_t cluster_id) const {
  const std::shared_ptr<datadist::Link> link = state_->table->Find(cluster_id);
  const std::lock_guard<std::mutex> lock(state_->mutex);
  if (link != nullptr) {
    const Comm *comm = link->comm_name().empty() ? nullptr : state_->FindByNameLocked(link->comm_name());
    return comm == nullptr ? Status::Ok() : NotReady(*comm, cluster_id);
  }
  for (const auto &[id, entry] : state_->comms) {
    if (entry.comm->HasMember(cluster_id)) {
      if (Status status = NotReady(*entry.comm, cluster_id); !status.ok()) {
        return status;
      }
    }
  }
  return Status::Ok();
}

bool CommTable::Empty() const {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->comms.empty();
}

void CommTable::Stop() {
  std::vector<std::shared_ptr<Comm>> comms;
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->stopped = true;
    for (const auto &[id, entry] : state_->comms) {
      comms.push_back(entry.comm);
    }
  }
  for (const std::shared_ptr<Comm> &comm : comms) {
    comm->Cancel();  // all before the first join, which may wait for a dial
  }
  for (const std::shared_ptr<Comm> &comm : comms) {
    comm->End();
  }
  const std::lock_guard<std::mutex> lock(state_->mutex);
  state_->comms.clear();
}

}  // namespace datadist
