#include "support/member.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <thread>
#include <utility>

#include "link/client_handshake.h"

namespace datadist::testing {

using datadist::test::Arena;
using datadist::test::PatternOf;

namespace {

// Its incarnation is known from then on.
std::shared_ptr<LocalEndpoint> Started(std::shared_ptr<LocalEndpoint> endpoint) {
  const Status status = endpoint->Start();
  if (!status.ok()) {
    ADD_FAILURE() << status.text();
  }
  return endpoint;
}

}  // namespace

Member::Member(uint64_t cluster_id, const LinkOptions &options, uint32_t max_comms, const RegionLimits &limits)
    : endpoint_(Started(std::make_shared<LocalEndpoint>(cluster_id, llm_datadist::LlmRole::kMix, options, limits,
                                                        CacheRegistry::Pools{}, 2))),
      table_(std::make_shared<LinkTable>(cluster_id, endpoint_->incarnation(), options.max_links)),
      comms_(std::make_unique<CommTable>(endpoint_, table_, max_comms)) {}

// In the order of Engine::Stop.
Member::~Member() {
  comms_->Stop();
  StopListening();
  const std::vector<std::shared_ptr<Link>> links = table_->Shut();
  for (const std::shared_ptr<Link> &link : links) {
    link->Close("finalized");
  }
  for (const std::shared_ptr<Link> &link : links) {
    link->WaitUntilServed();
  }
  endpoint_->StopServing();
  endpoint_->loop()->Stop();
  endpoint_->regions()->UnregisterAll();
}

void Member::StopListening() {
  if (const std::shared_ptr<Acceptor> acceptor = std::exchange(acceptor_, nullptr)) {
    endpoint_->loop()->Run([&acceptor] { acceptor->StopOnLoop(); });
  }
}

SocketAddress Member::Listen(bool within_host) {
  Listeners listeners = datadist::Listen(FreeAddress()).value();
  if (!within_host) {
    listeners.local.Reset();
  }
  StopListening();
  const SocketAddress address = SocketAddress::LocalOf(listeners.tcp.get());
  acceptor_ = std::make_shared<Acceptor>(endpoint_, table_);
  endpoint_->loop()->Run([&] { acceptor_->StartOnLoop(std::move(listeners)); });
  comms_->SetServerAddress(address);
  return address;
}

Status Member::Dial(const SocketAddress &address, uint64_t expected_id, const std::string &comm_name,
                    int64_t comm_id) {
  return DialLink(endpoint_, table_, DialTarget{address, expected_id, comm_name, comm_id}, Deadline::In(kPatience));
}

Status Member::Unlink(uint64_t peer_id) {
  const std::shared_ptr<Link> link = table_->Find(peer_id);
  if (link == nullptr) {
    return Status(llm_datadist::LLM_NOT_YET_LINK, "no link");
  }
  Status status = link->Unlink(Deadline::In(kPatience));
  table_->Remove(link.get());
  link->Close("unlinked");
  return status;
}

bool Member::Linked(uint64_t peer_id) const { return table_->HasLive(peer_id); }

int64_t Member::AddCache(uint64_t seed, const CacheRights &rights) {
  auto arena = std::make_unique<Arena>(kShape);
  arena->Fill(PatternOf(kShape, seed));
  Registration registration;
  registration.rights = rights;
  const auto desc = datadist::test::DescOf(kShape);
  const int64_t id = endpoint_->regions()->Register(desc, arena->Addrs(), registration).value();
  arenas_[id] = std::move(arena);
  return id;
}

std::vector<uint8_t> Member::Bytes(int64_t cache_id) {
  // The lock of the registrations orders this thread after those that moved the bytes, visibly for ThreadSanitizer.
  endpoint_->regions()->Unregister(0);
  std::vector<uint8_t> bytes = arenas_.at(cache_id)->Bytes();
  endpoint_->regions()->Unregister(0);
  return bytes;
}

bool Member::CanariesIntact() const {
  return std::all_of(arenas_.begin(), arenas_.end(),
                     [](const auto &entry) { return entry.second->CanariesIntact(); });
}

Status Member::Pull(uint64_t peer_id, int64_t remote, int64_t local, uint64_t from, uint64_t to, uint64_t count) {
  const Run run{from * kShape.stride, to * kShape.stride, count * kShape.stride};
  return Transfer(TransferDirection::kPull, peer_id, remote, local, run);
}

Status Member::Push(uint64_t peer_id, int64_t local, int64_t remote, uint64_t from, uint64_t to, uint64_t count) {
  const Run run{to * kShape.stride, from * kShape.stride, count * kShape.stride};
  return Transfer(TransferDirection::kPush, peer_id, remote, local, run);
}

Status Member::Transfer(TransferDirection direction, uint64_t peer_id, int64_t remote, int64_t local, Run run) {
  if (Status ready = comms_->CheckReady(peer_id); !ready.ok()) {
    return ready;
  }
  const std::shared_ptr<Link> link = table_->Find(peer_id);
  if (link == nullptr) {
    return Status(llm_datadist::LLM_NOT_YET_LINK, "no link");
  }
  const Result<CachePin> pin = endpoint_->regions()->Pin(local);
  if (!pin.ok()) {
    return pin.status();
  }
  const auto planner = [&](const RemoteTarget &) -> Result<TransferOp> {
    TransferOp op;
    op.local = &pin.value();
    op.tensor_count = kShape.num_tensors;
    op.runs = {run};
    return op;
  };
  return link->Transfer(direction, {{CacheRef::Id(remote), planner}}, Deadline::In(kPatience));
}

CommTable::Report Member::Settled(int64_t comm_id) {
  CommTable::Report report;
  EXPECT_TRUE(Eventually([&] {
    const Result<CommTable::Report> answer = comms_->Query(comm_id);
    report = answer.ok() ? answer.value() : CommTable::Report{CommState::kFailed, answer.status().text()};
    return report.state != CommState::kPreparing;
  })) << "comm " << comm_id << " is still preparing";
  return report;
}

LinkOptions OpenToAll() {
  LinkOptions options;
  options.trust.insecure = true;
  return options;
}

std::vector<uint8_t> Copied(uint64_t from_seed, uint64_t to_seed, uint64_t from, uint64_t to, uint64_t count) {
  const datadist::test::CacheShape &shape = Member::kShape;
  const std::vector<uint8_t> source = PatternOf(shape, from_seed);
  std::vector<uint8_t> result = PatternOf(shape, to_seed);
  for (uint64_t tensor = 0; tensor < shape.num_tensors; ++tensor) {
    for (uint64_t byte = 0; byte < count * shape.stride; ++byte) {
      const uint64_t base = tensor * shape.num_blocks * shape.stride + byte;
      result[base + to * shape.stride] = source[base + from * shape.stride];
    }
  }
  return result;
}

SocketAddress FreeAddress() {
  const auto pid = static_cast<uint32_t>(::getpid());
  const std::string ip = "127." + std::to_string(1 + pid / 65536 % 255) + "." + std::to_string(pid / 256 % 256) + "." +
                         std::to_string(1 + pid % 255);
  const Listeners probe = datadist::Listen(SocketAddress::FromIp(ip, 0).value()).value();
  return SocketAddress::LocalOf(probe.tcp.get());
}

bool Eventually(const std::function<bool()> &holds) {
  const Deadline deadline = Deadline::In(kPatience);
  while (!holds()) {
    if (deadline.Expired()) {
      return false;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return true;
}

}  // namespace datadist::testing
