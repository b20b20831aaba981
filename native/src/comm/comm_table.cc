#include "comm/comm_table.h"

#include <algorithm>
#include <set>
#include <utility>

#include "control/opening.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_NOT_YET_LINK;

constexpr int kMaxPreparing = 16;
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
  const CommReport report = comm.Report();
  return Status(LLM_NOT_YET_LINK,
                "cluster " + std::to_string(cluster_id) + ": comm '" + comm.name() + "' " +
                    (report.state == CommState::kFailed ? "failed: " + report.reason : "is still being prepared"));
}

Status Unknown(int64_t comm_id) {
  return Status(LLM_NOT_YET_LINK, "comm_id: " + std::to_string(comm_id) + " is not linked");
}

bool Covers(const SocketAddress &server, const SocketAddress &address) {
  const std::string text = server.ToString();
  const bool any = text.rfind("0.0.0.0:", 0) == 0 || text.rfind("[::]:", 0) == 0;
  return server.port() == address.port() && server.family() == address.family() &&
         (any || text == address.ToString());
}

}  // namespace

// As many threads as comms prepare, each of which dials one member at a time: so no dial waits for another that gets no
// answer.
CommTable::CommTable(std::shared_ptr<LocalEndpoint> endpoint, std::shared_ptr<LinkTable> table, uint32_t max_comms)
    : endpoint_(std::move(endpoint)), table_(std::move(table)), max_comms_(max_comms), runner_(kMaxPreparing) {
  table_->SetCommFinder([this](const std::string &name, uint64_t peer_id) -> std::shared_ptr<CommWaiter> {
    const std::shared_ptr<Comm> comm = FindByNameOnLoop(name);
    return comm != nullptr && (comm->waiting() || comm->preparing()) && comm->HasMember(peer_id) ? comm : nullptr;
  });
}

CommTable::~CommTable() { Stop(); }

// ---- calls ----

void CommTable::SetServerAddress(std::optional<SocketAddress> address) {
  endpoint_->loop()->Run([&] { server_address_ = std::move(address); });
}

Result<int64_t> CommTable::Link(const std::string &name, const std::vector<CommMember> &members,
                                std::chrono::seconds total_time) {
  Result<CommPlan> plan = MakePlan(name, members, endpoint_->cluster_id(), total_time);
  if (!plan.ok()) {
    return plan.status();
  }
  Result<int64_t> id(Status(LLM_FAILED, "finalized, or out of memory"));
  endpoint_->loop()->Run([&] { id = LinkOnLoop(std::move(plan).value()); });
  return id;
}

Status CommTable::Unlink(int64_t comm_id) {
  std::shared_ptr<Comm> comm;
  endpoint_->loop()->Run([&] {
    comm = FindOnLoop(comm_id);
    if (comm != nullptr) {
      comm->EndOnLoop();
    }
  });
  if (comm == nullptr) {
    return Unknown(comm_id);
  }
  // Transfers end by their own deadlines, which are sooner.
  comm->Leave(Deadline::In(endpoint_->MaxPeerHold()));
  endpoint_->loop()->Run([&] { comms_.erase(comm_id); });
  return Status::Ok();
}

Result<CommTable::Report> CommTable::Query(int64_t comm_id) const {
  Result<Report> report(Unknown(comm_id));
  endpoint_->loop()->Run([&] {
    if (const std::shared_ptr<Comm> comm = FindOnLoop(comm_id)) {
      report = comm->Report();
    }
  });
  return report;
}

Status CommTable::CheckReady(uint64_t cluster_id) const {
  const std::shared_ptr<datadist::Link> link = table_->Find(cluster_id);
  if (link != nullptr && (link->comm_name().empty() || link->comm_ok())) {
    return Status::Ok();
  }
  Status status(LLM_NOT_YET_LINK, "cluster " + std::to_string(cluster_id) + ": finalized, or out of memory");
  endpoint_->loop()->Run([&] { status = CheckReadyOnLoop(cluster_id, link.get()); });
  return status;
}

bool CommTable::Empty() const {
  bool empty = true;
  endpoint_->loop()->Run([&] { empty = comms_.empty(); });
  return empty;
}

void CommTable::Stop() {
  endpoint_->loop()->Run([this] {
    stopped_ = true;
    table_->SetCommFinder(nullptr);
    for (const auto &[id, entry] : comms_) {
      entry.comm->EndOnLoop();
    }
  });
  runner_.Stop();
  endpoint_->loop()->Run([this] { comms_.clear(); });
}

// ---- on the loop ----

// One that is being unlinked is unknown already.
std::shared_ptr<Comm> CommTable::FindOnLoop(int64_t comm_id) const {
  const auto it = comms_.find(comm_id);
  return it == comms_.end() || it->second.comm->ended() ? nullptr : it->second.comm;
}

std::shared_ptr<Comm> CommTable::FindByNameOnLoop(const std::string &name) const {
  const auto it = std::find_if(comms_.begin(), comms_.end(),
                               [&](const auto &entry) { return entry.second.comm->name() == name; });
  return it == comms_.end() ? nullptr : it->second.comm;
}

Status CommTable::CheckRoomOnLoop(const std::string &name) const {
  if (stopped_) {
    return Status(LLM_FAILED, "finalized");
  }
  if (FindByNameOnLoop(name) != nullptr) {
    return Invalid("comm_name: '" + name + "' is in use, unlink that comm first");
  }
  if (comms_.size() >= max_comms_) {
    return Invalid("comm '" + name + "': " + std::to_string(comms_.size()) + " comms exist, at most " +
                   std::to_string(max_comms_));
  }
  return Status::Ok();
}

Result<int64_t> CommTable::LinkOnLoop(CommPlan plan) {
  if (Status status = CheckRoomOnLoop(plan.name); !status.ok()) {
    return status;
  }
  Result<std::shared_ptr<void>> listener(nullptr);
  if (plan.listens()) {
    listener = ListenOnLoop(*plan.self.address);
    if (!listener.ok()) {
      return Status(listener.status().code(), "comm '" + plan.name + "': " + listener.status().text());
    }
  }
  plan.id = last_id_ + 1;
  const auto comm =
      std::make_shared<Comm>(endpoint_, table_, runner_, std::move(plan), [this] { PrepareNextOnLoop(); });
  comms_[last_id_ + 1] = Entry{comm, std::move(listener).value()};
  ++last_id_;
  PrepareNextOnLoop();
  return last_id_;
}

void CommTable::PrepareNextOnLoop() {
  const auto prepares = [](const auto &entry) { return entry.second.comm->preparing(); };
  for (const auto &[id, entry] : comms_) {
    if (!entry.comm->waiting()) {
      continue;
    }
    if (stopped_ || std::count_if(comms_.begin(), comms_.end(), prepares) >= kMaxPreparing) {
      return;
    }
    entry.comm->PrepareOnLoop();
  }
}

Status CommTable::CheckReadyOnLoop(uint64_t cluster_id, datadist::Link *link) const {
  for (const auto &[id, entry] : comms_) {
    const Comm &comm = *entry.comm;
    const bool theirs = link != nullptr ? comm.name() == link->comm_name() : comm.HasMember(cluster_id);
    if (theirs && comm.Report().state != CommState::kOk) {
      return NotReady(comm, cluster_id);
    }
  }
  if (link != nullptr) {
    link->MarkCommOk();
  }
  return Status::Ok();
}

Result<std::shared_ptr<void>> CommTable::ListenOnLoop(const SocketAddress &address) {
  if (server_address_.has_value() && Covers(*server_address_, address)) {
    return std::shared_ptr<void>();
  }
  const std::string key = address.ToString();
  if (const auto it = listeners_.find(key); it != listeners_.end()) {
    return it->second.lock();
  }
  Result<Listeners> listeners = ListenOpen(address, endpoint_->options().trust);
  if (!listeners.ok()) {
    return listeners.status();
  }
  const auto acceptor = std::make_shared<Acceptor>(endpoint_, table_, Admits::kComms);
  const std::shared_ptr<void> listener(acceptor.get(), [this, key, acceptor](void *) {
    acceptor->StopOnLoop();
    listeners_.erase(key);
  });
  listeners_[key] = listener;
  acceptor->StartOnLoop(std::move(listeners).value());
  return listener;
}

}  // namespace datadist
