// What all links of one initialised LlmDataDist share: who it is, its memory, its loop and threads, its link options.
#ifndef DATADIST_LINK_ENDPOINT_H_
#define DATADIST_LINK_ENDPOINT_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "base/status.h"
#include "base/task_runner.h"
#include "base/worker_pool.h"
#include "cache/cache_registry.h"
#include "control/event_loop.h"
#include "control/key_ring.h"
#include "control/messages.h"
#include "memory/region_table.h"
#include "transport/registry.h"

namespace datadist {

// What becomes of a transfer whose bytes are not the owner's afterwards.
enum class Verify : uint8_t { kOff, kLog, kFail };

struct LinkOptions {
  Trust trust;
  Verify verify = Verify::kOff;
  TransportList transports = BuiltInTransports();
  std::string forced_transport;  // empty: the best that reaches the peer
  uint16_t tcp_streams = 2;
  std::chrono::milliseconds heartbeat_interval{2000};
  std::chrono::milliseconds transfer_timeout{1000};
  uint32_t max_links = 512;
  // Off: two-sided mode of the Python API, where a pull by a request key consumes it and only peers pull.
  bool remote_accessible = true;
  bool hixl_backend = false;
  // Whether OPTION_LOCAL_COMM_RES makes sense: the API judges it when linking, not before.
  Status local_comm_res;
};

class LocalEndpoint {
 public:
  LocalEndpoint(uint64_t cluster_id, llm_datadist::LlmRole role, LinkOptions options, RegionLimits limits,
                const CacheRegistry::Pools &pools, size_t transfer_threads);
  LocalEndpoint(const LocalEndpoint &) = delete;
  LocalEndpoint &operator=(const LocalEndpoint &) = delete;

  Status Start();
  // Ends the threads that serve peers. Idempotent.
  void StopServing();

  uint64_t cluster_id() const { return cluster_id_; }
  void SetRole(llm_datadist::LlmRole role) { role_.store(role); }
  const LinkOptions &options() const { return options_; }
  const Incarnation &incarnation() const { return incarnation_; }
  const std::shared_ptr<RegionTable> &regions() const { return regions_; }
  const std::shared_ptr<CacheRegistry> &caches() const { return caches_; }
  const std::shared_ptr<EventLoop> &loop() const { return loop_; }
  const std::shared_ptr<WorkerPool> &pool() const { return pool_; }
  // Copies that peers have asked for.
  TaskRunner &serving() { return serving_; }
  const Transports &transports() const { return transports_; }

  // The longest that a peer's request may hold memory of ours.
  std::chrono::milliseconds MaxPeerHold() const;

  EndpointInfo Info() const;

 private:
  const uint64_t cluster_id_;
  std::atomic<llm_datadist::LlmRole> role_;
  const LinkOptions options_;
  const std::shared_ptr<RegionTable> regions_;
  const std::shared_ptr<CacheRegistry> caches_;
  const std::shared_ptr<EventLoop> loop_;
  const std::shared_ptr<WorkerPool> pool_;
  TaskRunner serving_;
  Transports transports_;
  Incarnation incarnation_{};
};

// LLM_PARAM_INVALID unless both ends have remote access, or both have not.
Status CheckSameAccess(const LocalEndpoint &endpoint, const EndpointInfo &peer);

// Whether another endpoint may have that cluster id: any but our own. Two-sided clients of a server may have ours, too:
// programs that are published give both ends the same one. Members of a comm are told apart by it.
bool MayBeCalled(const LocalEndpoint &endpoint, uint64_t cluster_id, const std::string &comm_name);

}  // namespace datadist

#endif  // DATADIST_LINK_ENDPOINT_H_
