// What stands behind one LlmDataDist of the stand-in: an endpoint of our engine that is held to CANN's rules.
#ifndef DATADIST_TESTS_STANDIN_ENDPOINT_H_
#define DATADIST_TESTS_STANDIN_ENDPOINT_H_

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "late_writes.h"
#include "provider/provider.h"
#include "rules.h"

namespace standin {

using Code = uint32_t;
using datadist::BlocksTransfer;
using datadist::CacheTransfer;
using Clusters = std::vector<llm_datadist::ClusterInfo>;

class Endpoint {
 public:
  Endpoint(uint64_t cluster_id, llm_datadist::LlmRole role);
  ~Endpoint();

  Code Initialize(const datadist::Options &options);
  void Finalize();
  Code SetRole(llm_datadist::LlmRole role, const datadist::Options &options);
  // The codes are appended.
  Code Link(const Clusters &clusters, std::vector<Code> &codes, int32_t timeout_ms);
  Code Unlink(const Clusters &clusters, std::vector<Code> &codes, int32_t timeout_ms, bool force);
  Code Register(const llm_datadist::CacheDesc &desc, const std::vector<uint64_t> &addrs, int64_t &cache_id);
  Code Unregister(int64_t cache_id);
  Code PullBlocks(BlocksTransfer transfer);
  Code PushBlocks(BlocksTransfer transfer);
  Code PullCache(CacheTransfer transfer);
  Code PushCache(CacheTransfer transfer);

 private:
  struct Cache {
    std::vector<uint64_t> addrs;
    uint64_t tensor_bytes = 0;
    uint64_t stride = 0;
  };
  // Of a link that this end made: what there was then. Later caches, here or there, are unknown over it.
  struct MadeLink {
    int64_t last_here = 0;
    int64_t last_there = 0;
  };

  // act() -> code, as one call: counted, refused to threads without a device, traced.
  template <typename Act>
  Code Call(const std::string &call, const Act &act);
  template <typename Transfer, typename Act>
  Code Transferred(const char *call, Transfer &transfer, const Act &act);

  void StealPort(const datadist::Options &options);
  Code RegisterOwn();
  void RememberLink(uint64_t cluster_id);
  Code CheckKnown(uint64_t cluster_id, int64_t local_id, int64_t remote_id);
  Code CheckRegions(const Cache &cache);
  bool IsLate(const BlocksTransfer &transfer);

  const Rules rules_ = Rules::FromEnvironment();
  const std::unique_ptr<datadist::Provider> engine_;
  std::atomic<int> running_{0};

  // The engine's caches 1 and 2: the id of this end's last cache, which peers pull, and where it is pulled to.
  uint64_t last_cache_ = 0;
  uint64_t pulled_last_cache_ = 0;
  std::mutex table_mutex_;

  std::mutex mutex_;
  std::map<int64_t, Cache> caches_;
  std::map<uint64_t, MadeLink> links_;
  uint64_t pulls_ = 0;
  LateWrites late_;
};

}  // namespace standin

#endif  // DATADIST_TESTS_STANDIN_ENDPOINT_H_
