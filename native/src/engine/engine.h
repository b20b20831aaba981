// One initialised LlmDataDist: orchestration of memory, links and transfers, in the order of checks that the API
// promises.
//
// Lives from Initialize to Finalize, and on for as long as a running call holds it; after Stop such a call ends soon.
#ifndef DATADIST_ENGINE_ENGINE_H_
#define DATADIST_ENGINE_ENGINE_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/status.h"
#include "engine/options.h"
#include "link/acceptor.h"
#include "link/endpoint.h"
#include "link/link_table.h"
#include "llm_datadist/llm_datadist_ext.h"

namespace datadist {

class Engine {
 public:
  static Result<std::shared_ptr<Engine>> Start(uint64_t cluster_id, llm_datadist::LlmRole role, const OptionMap &map);
  ~Engine();
  Engine(const Engine &) = delete;
  Engine &operator=(const Engine &) = delete;

  // Drops every link, registration and listener, and joins the loop. Waits for transfers that hold our memory, which
  // end because their links do, and no longer than their deadlines. Idempotent.
  void Stop();

  Result<int64_t> RegisterKvCache(const llm_datadist::CacheDesc &desc, const std::vector<uint64_t> &addrs);
  void UnregisterKvCache(int64_t cache_id);

  // One status per cluster, in order. Not ok by itself: the call as a whole is refused.
  using Clusters = std::vector<llm_datadist::ClusterInfo>;
  Result<std::vector<Status>> LinkClusters(const Clusters &clusters, int32_t timeout_ms);
  Result<std::vector<Status>> UnlinkClusters(const Clusters &clusters, int32_t timeout_ms, bool force);

  Status PullKvBlocks(const llm_datadist::CacheIndex &src, int64_t dst_cache_id,
                      const std::vector<uint64_t> &src_blocks, const std::vector<uint64_t> &dst_blocks,
                      const llm_datadist::KvCacheExtParam &ext);
  Status PushKvBlocks(const llm_datadist::Cache &src_cache, const llm_datadist::CacheIndex &dst,
                      const std::vector<uint64_t> &src_blocks, const std::vector<uint64_t> &dst_blocks,
                      const llm_datadist::KvCacheExtParam &ext);

  Result<uint16_t> ListenPort() const;
  Result<llm_datadist::LinkReport> QueryLink(uint64_t cluster_id) const;

 private:
  Engine(std::shared_ptr<LocalEndpoint> endpoint, bool comm_res_known, bool huge_pages);
  Status StartListening(Fd listener);
  Status LinkOne(const llm_datadist::ClusterInfo &cluster, Deadline deadline);
  Status UnlinkOne(const llm_datadist::ClusterInfo &cluster, Deadline deadline, bool force);
  Result<std::shared_ptr<Link>> FindLink(uint64_t cluster_id) const;

  const std::shared_ptr<LocalEndpoint> endpoint_;
  const std::shared_ptr<LinkTable> table_;
  std::shared_ptr<Acceptor> acceptor_;  // empty when this endpoint does not listen
  uint16_t listen_port_ = 0;
  // The API wants a local ip in the first link of an endpoint that has neither a listener nor a LocalCommRes.
  std::atomic<bool> comm_res_known_;
  const bool huge_pages_;
};

}  // namespace datadist

#endif  // DATADIST_ENGINE_ENGINE_H_
