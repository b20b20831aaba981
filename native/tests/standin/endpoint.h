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
    size_t row = 0;  // of the peer's table
  };
  // What an endpoint tells those that link to it, and where each of them enters itself. An entry stays until one of the
  // two unlinks by name: the half of a link that nobody tells of the other's end.
  struct Table {
    static constexpr size_t kVisitors = 1024;
    uint64_t last_cache = 0;
    uint64_t max_links = 0;
    uint64_t visitors[kVisitors] = {};  // cluster id + 1; 0 for nobody
  };

  // act() -> code, as one call: counted, refused to threads without a device, traced.
  template <typename Act>
  Code Call(const std::string &call, const Act &act);
  template <typename Transfer, typename Act>
  Code Transferred(const char *call, Transfer &transfer, const Act &act);

  void StealPort(const datadist::Options &options);
  Code RegisterOwn();
  Code EnterLink(uint64_t cluster_id);
  bool WriteEntry(uint64_t cluster_id, size_t row, uint64_t entry);
  void LeaveLinks(const Clusters &clusters, bool tell);
  Code CheckKnown(uint64_t cluster_id, int64_t local_id, int64_t remote_id);
  Code CheckRegions(const Cache &cache);
  bool IsLate(const BlocksTransfer &transfer);

  const uint64_t cluster_id_;
  const Rules rules_ = Rules::FromEnvironment();
  const std::unique_ptr<datadist::Provider> engine_;
  std::atomic<int> running_{0};

  // The engine's caches 1 and 2: this end's table, and a copy of a peer's.
  Table table_;
  Table theirs_;
  std::mutex theirs_mutex_;

  std::mutex mutex_;
  std::map<int64_t, Cache> caches_;
  std::map<uint64_t, MadeLink> links_;
  uint64_t pulls_ = 0;
  LateWrites late_;
};

}  // namespace standin

#endif  // DATADIST_TESTS_STANDIN_ENDPOINT_H_
