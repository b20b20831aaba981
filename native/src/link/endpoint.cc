#include "link/endpoint.h"

#include <unistd.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "base/random.h"
#include "link/digests.h"
#include "llm_datadist/llm_datadist_ext.h"

namespace datadist {
namespace {

using llm_datadist::LLM_LINK_FAILED;

// Longer than any sensible transfer of one layer, short enough for a Finalize that waits for a peer that went silent.
constexpr std::chrono::milliseconds kMaxPeerHold{30000};
// Peers' pushes at a time; more wait for one another.
constexpr size_t kServingThreads = 4;

// For the data connections of all links. A thread copies several GB/s, more than most networks carry.
size_t DataThreads() { return std::clamp<size_t>(std::thread::hardware_concurrency(), 2, 8); }

// The live endpoints of this process. A child made by fork() has a copy of its parent's entries, whose memory is not
// the parent's any more: hence the pid.
struct Registry {
  struct Entry {
    std::weak_ptr<RegionTable> regions;
    pid_t pid;
  };
  std::mutex mutex;
  std::map<Incarnation, Entry> entries;  // guarded by mutex
};

// Never destroyed: an endpoint may be finalized by a static object's destructor, after ours would have run.
Registry &TheRegistry() {
  static auto *registry = new Registry;
  return *registry;
}

}  // namespace

LocalEndpoint::LocalEndpoint(uint64_t cluster_id, llm_datadist::LlmRole role, LinkOptions options, RegionLimits limits,
                             const CacheRegistry::Pools &pools, size_t transfer_threads)
    : cluster_id_(cluster_id),
      role_(role),
      options_(std::move(options)),
      regions_(RegionTable::Create(limits)),
      caches_(std::make_shared<CacheRegistry>(regions_, pools, !options_.remote_accessible)),
      loop_(std::make_shared<EventLoop>()),
      pool_(std::make_shared<WorkerPool>(transfer_threads)),
      serving_(kServingThreads),
      streams_(DataThreads()) {}

LocalEndpoint::~LocalEndpoint() { Retire(); }

Status LocalEndpoint::Start() {
  const Result<Incarnation> incarnation = RandomBytes();
  if (!incarnation.ok()) {
    return incarnation.status();
  }
  incarnation_ = incarnation.value();
  if (!options_.forced_transport.has_value() || *options_.forced_transport == TransportKind::kCma) {
    AllowCmaFromPeers();
  }
  if (Status status = options_.verify == Verify::kOff ? Status::Ok() : CheckDetector(); !status.ok()) {
    return status;
  }
  if (Status status = loop_->Start(); !status.ok()) {
    return status;
  }
  Registry &registry = TheRegistry();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  registry.entries[incarnation_] = Registry::Entry{regions_, ::getpid()};
  return Status::Ok();
}

void LocalEndpoint::Retire() {
  Registry &registry = TheRegistry();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  registry.entries.erase(incarnation_);
}

std::chrono::milliseconds LocalEndpoint::MaxPeerHold() const {
  return std::max(kMaxPeerHold, options_.transfer_timeout);
}

EndpointInfo LocalEndpoint::Info() const {
  EndpointInfo info;
  info.cluster_id = cluster_id_;
  info.role = static_cast<int32_t>(role_.load());
  info.incarnation = incarnation_;
  info.tcp_streams = options_.tcp_streams;
  info.remote_accessible = options_.remote_accessible;
  return info;
}

std::weak_ptr<RegionTable> FindLocalRegions(const Incarnation &incarnation) {
  Registry &registry = TheRegistry();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  const auto it = registry.entries.find(incarnation);
  return it != registry.entries.end() && it->second.pid == ::getpid() ? it->second.regions
                                                                       : std::weak_ptr<RegionTable>();
}

Status CheckSameAccess(const LocalEndpoint &endpoint, const EndpointInfo &peer) {
  const bool ours = endpoint.options().remote_accessible;
  if (ours == peer.remote_accessible) {
    return Status::Ok();
  }
  const auto side = [](bool accessible, uint64_t cluster_id) {
    return std::string(accessible ? "1" : "0") + " at cluster " + std::to_string(cluster_id);
  };
  return Status(llm_datadist::LLM_PARAM_INVALID,
                "llm.EnableRemoteCacheAccessible differs: " + side(ours, endpoint.cluster_id()) + ", " +
                    side(peer.remote_accessible, peer.cluster_id) + "; both ends need the same");
}

bool MayBeCalled(const LocalEndpoint &endpoint, uint64_t cluster_id, const std::string &comm_name) {
  return cluster_id != endpoint.cluster_id() || (!endpoint.options().remote_accessible && comm_name.empty());
}

Result<TransportChoice> ChooseTransport(const LinkOptions &options, const EndpointInfo &peer,
                                        const PeerProcess *process) {
  const auto forced = options.forced_transport;
  const auto wanted = [&](TransportKind kind) { return !forced.has_value() || *forced == kind; };
  std::string forced_text;
  if (forced.has_value()) {
    forced_text = std::string("forced by ") + llm_datadist::OPTION_TRANSPORT;
  }
  if (wanted(TransportKind::kLocal)) {
    if (process != nullptr && process->IsSelf() && !FindLocalRegions(peer.incarnation).expired()) {
      return TransportChoice{TransportKind::kLocal, ""};
    }
    if (forced.has_value()) {
      return Status(LLM_LINK_FAILED, forced_text + ": transport local cannot reach a peer in another process");
    }
  }
  std::string why_not_cma;
  if (wanted(TransportKind::kCma)) {
    const Status probe = process != nullptr ? ProbeCma(*process)
                                            : Status(LLM_LINK_FAILED, "the peer is not known to be on this host");
    if (probe.ok()) {
      return TransportChoice{TransportKind::kCma, forced_text};
    }
    if (forced.has_value()) {
      return Status(LLM_LINK_FAILED, forced_text + ": transport cma cannot reach the peer: " + probe.text());
    }
    why_not_cma = "cma: " + probe.text();
  }
  return TransportChoice{TransportKind::kTcp, forced.has_value() ? forced_text : why_not_cma};
}

Status CheckIncoming(TransportKind kind, const PeerProcess *process) {
  if (kind == TransportKind::kTcp || (kind == TransportKind::kCma && process != nullptr) ||
      (kind == TransportKind::kLocal && process != nullptr && process->IsSelf())) {
    return Status::Ok();
  }
  return Status(LLM_LINK_FAILED, std::string("transport ") + TransportName(kind) +
                                     " is for a peer that the kernel names, on this host or in this process");
}

}  // namespace datadist
