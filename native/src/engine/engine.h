// One initialised LlmDataDist: orchestration of memory, links and transfers, in the order of checks that the API
// promises.
//
// Lives from Initialize to Finalize, and on for as long as a running call holds it; after Stop such a call ends soon.
#ifndef DATADIST_ENGINE_ENGINE_H_
#define DATADIST_ENGINE_ENGINE_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "base/status.h"
#include "engine/options.h"
#include "engine/statistics.h"
#include "link/acceptor.h"
#include "comm/comm_table.h"
#include "link/endpoint.h"
#include "link/link_table.h"
#include "llm_datadist/llm_datadist_ext.h"
#include "memory/huge_pages.h"
#include "transfer/moves.h"
#include "transfer/targets.h"

namespace datadist {

class Engine {
 public:
  static Result<std::shared_ptr<Engine>> Start(uint64_t cluster_id, llm_datadist::LlmRole role, EngineApi api,
                                               const OptionMap &map);
  ~Engine();
  Engine(const Engine &) = delete;
  Engine &operator=(const Engine &) = delete;

  // Drops every link, registration and listener, and joins the loop. Waits for transfers that hold our memory, which
  // end because their links do, and no longer than their deadlines. Idempotent.
  void Stop();

  Status SetRole(llm_datadist::LlmRole role, const OptionMap &map);

  bool remote_accessible() const { return endpoint_->options().remote_accessible; }

  // ---- caches ----
  Result<int64_t> RegisterCache(const llm_datadist::CacheDesc &desc, const std::vector<uint64_t> &addrs,
                                const Registration &registration, const RowKeys &keys);
  void UnregisterCache(int64_t cache_id);
  CacheRegistry &caches() { return *endpoint_->caches(); }
  Result<uint64_t> GrantWrites(uint64_t cluster_id, const std::vector<WritableBlocks> &blocks) {
    return endpoint_->regions()->GrantWrites(cluster_id, blocks);
  }
  Status RevokeWrites(uint64_t grant_id) { return endpoint_->regions()->RevokeWrites(grant_id); }
  // Returns when the kernel has been asked for huge pages under all that is registered by now, or at Stop.
  llm_datadist::HugePagesReport WaitForHugePages();

  // ---- links ----
  // One status per cluster, in order. Not ok by itself: the call as a whole is refused.
  using Clusters = std::vector<llm_datadist::ClusterInfo>;
  Result<std::vector<Status>> LinkClusters(const Clusters &clusters, int32_t timeout_ms);
  Result<std::vector<Status>> UnlinkClusters(const Clusters &clusters, int32_t timeout_ms, bool force);
  bool HasLinks() const { return !table_->Empty(); }
  // Bilateral links. LLM_FEATURE_NOT_ENABLED with backend hixl.
  Result<CommTable *> Comms();

  // ---- transfers of the C++ API, checks in its order ----
  Status PullKvCache(const llm_datadist::CacheIndex &src, int64_t dst_cache_id, uint32_t dst_row, int64_t size,
                     const llm_datadist::KvCacheExtParam &ext);
  Status PullKvBlocks(const llm_datadist::CacheIndex &src, int64_t dst_cache_id,
                      const std::vector<uint64_t> &src_blocks, const std::vector<uint64_t> &dst_blocks,
                      const llm_datadist::KvCacheExtParam &ext,
                      std::optional<std::chrono::milliseconds> time_left = std::nullopt);
  Status PushKvCache(const llm_datadist::Cache &src_cache, const llm_datadist::CacheIndex &dst, uint32_t src_row,
                     int64_t size, const llm_datadist::KvCacheExtParam &ext);
  Status PushKvBlocks(const llm_datadist::Cache &src_cache, const llm_datadist::CacheIndex &dst,
                      const std::vector<uint64_t> &src_blocks, const std::vector<uint64_t> &dst_blocks,
                      const llm_datadist::KvCacheExtParam &ext,
                      std::optional<std::chrono::milliseconds> time_left = std::nullopt);

  // ---- transfers below it, as the Python API needs them as well ----
  // The move's source row is target.src_row, or the row of the key. A piece move gets its size from the local cache.
  Status Pull(const PullTarget &target, Move move);
  Status PushLayer(const PushTarget &target, const CacheRef &dst, const Move &move);
  // One address of the peer's per tensor of the layer.
  Status PushLayerToAddresses(const PushTarget &target, const std::vector<uint64_t> &dst_addrs, const Move &move);

  // ---- copies within this process ----
  Status CopyRow(const RowCopy &copy);
  Status CopyBlocks(int64_t cache_id, const BlockMove &move);
  // The source's blocks to those of each list.
  Status CopyKvBlocks(const llm_datadist::Cache &src, const llm_datadist::Cache &dst,
                      const std::vector<uint64_t> &src_blocks, const std::vector<std::vector<uint64_t>> &dst_lists);
  Status CopyBlocksBetween(const CopySide &src, const CopySide &dst, uint64_t block_bytes, const BlockMove &move);

  Result<uint16_t> ListenPort() const;
  Result<llm_datadist::LinkReport> QueryLink(uint64_t cluster_id) const;
  std::vector<uint64_t> LinkedClusters() const { return table_->PeerIds(); }

 private:
  Engine(std::shared_ptr<LocalEndpoint> endpoint, const EngineOptions &options);
  Status StartListening(Listeners listeners, const SocketAddress &asked);
  void StopListening();
  Status MoveListener(const std::optional<SocketAddress> &wanted);
  Status LinkOne(const llm_datadist::ClusterInfo &cluster, Deadline deadline);
  Status UnlinkOne(const llm_datadist::ClusterInfo &cluster, Deadline deadline, bool force);
  Result<std::shared_ptr<Link>> FindLink(uint64_t cluster_id) const;
  Deadline TransferDeadline(std::optional<std::chrono::milliseconds> time_left) const;
  bool IsOurselves(uint64_t cluster_id) const;
  Status PullOnce(const PullTarget &target, Move &move);
  Result<int64_t> PushSome(const PushTarget &target, const CacheRef &dst, Move move);
  Status PushTogether(const PushTarget &target, const CacheRef &dst, Move &move, int64_t &layers);
  Status PushLayers(const llm_datadist::Cache &src_cache, const llm_datadist::CacheIndex &dst, const Move &move,
                    const llm_datadist::KvCacheExtParam &ext, std::optional<std::chrono::milliseconds> time_left);

  const std::shared_ptr<LocalEndpoint> endpoint_;
  const std::shared_ptr<LinkTable> table_;
  const std::shared_ptr<Statistics> statistics_;
  CommTable comms_;
  // The API wants a local ip in the first link of an endpoint that has neither a listener nor a LocalCommRes.
  std::atomic<bool> comm_res_known_;
  const std::unique_ptr<HugePages> huge_pages_;  // empty when they are not wanted
  std::atomic<bool> stopped_{false};

  std::mutex role_mutex_;  // one SetRole at a time
  mutable std::mutex listener_mutex_;
  std::shared_ptr<Acceptor> acceptor_;  // empty when this endpoint does not listen; guarded by listener_mutex_
  SocketAddress asked_address_;         // as the option said it; guarded by listener_mutex_
  SocketAddress listen_address_;        // as bound; guarded by listener_mutex_
};

}  // namespace datadist

#endif  // DATADIST_ENGINE_ENGINE_H_
