#include "link/endpoint.h"

#include <algorithm>
#include <utility>

#include "base/random.h"
#include "memory/digests.h"

namespace datadist {
namespace {

// Longer than any sensible transfer of one layer, short enough for a Finalize that waits for a peer that went silent.
constexpr std::chrono::milliseconds kMaxPeerHold{30000};
// Peers' pushes at a time; more wait for one another.
constexpr size_t kServingThreads = 4;

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
      transports_(options_.transports, TransportHost{cluster_id_, regions_, pool_, MaxPeerHold(), options_.tcp_streams},
                  options_.forced_transport) {}

Status LocalEndpoint::Start() {
  const Result<Incarnation> incarnation = RandomBytes();
  if (!incarnation.ok()) {
    return incarnation.status();
  }
  incarnation_ = incarnation.value();
  transports_.Start();
  if (Status status = options_.verify == Verify::kOff ? Status::Ok() : CheckDetector(); !status.ok()) {
    return status;
  }
  return loop_->Start();
}

void LocalEndpoint::StopServing() {
  serving_.Stop();
  transports_.Stop();
}

std::chrono::milliseconds LocalEndpoint::MaxPeerHold() const {
  return std::max(kMaxPeerHold, options_.transfer_timeout);
}

EndpointInfo LocalEndpoint::Info() const {
  EndpointInfo info;
  info.cluster_id = cluster_id_;
  info.role = static_cast<int32_t>(role_.load());
  info.incarnation = incarnation_;
  info.remote_accessible = options_.remote_accessible;
  info.transports = transports_.Offers();
  return info;
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

}  // namespace datadist
