// What only the Python API of LLM-DataDist offers: cache layouts and keys, memory from pools, two-sided mode, copies
// within the process, bilateral links. A provider may have it, see Provider::extension().
//
// As of Provider: calls may come from any thread, none throws, and the reason of a failure is in the Status.
#ifndef DATADIST_PROVIDER_EXTENSION_H_
#define DATADIST_PROVIDER_EXTENSION_H_

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "cache/cache_key.h"
#include "comm/comm_report.h"
#include "llm_datadist/llm_datadist.h"
#include "transfer/moves.h"
#include "transfer/targets.h"

namespace datadist {

class Extension {
 public:
  virtual ~Extension() = default;

  // ---- bilateral links, see CommTable ----
  struct Member {
    uint64_t cluster_id = 0;
    uint32_t rank = 0;
    std::string ip;  // empty for all members: each is a loopback peer
    uint16_t port = 0;
  };
  virtual Result<int64_t> LinkComm(const std::string &name, const std::vector<Member> &members,
                                   std::chrono::seconds total_time) = 0;
  virtual Status UnlinkComm(int64_t comm_id) = 0;
  virtual Result<CommReport> QueryComm(int64_t comm_id) = 0;
  virtual Result<bool> HasLinks() = 0;

  // ---- caches, see CacheRegistry ----
  virtual Result<int64_t> RegisterCache(const llm_datadist::CacheDesc &desc, const std::vector<uint64_t> &addrs,
                                        const Registration &registration, const RowKeys &keys) = 0;
  virtual Result<llm_datadist::Cache> AllocateCache(const llm_datadist::CacheDesc &desc, CacheLayout layout,
                                                    const RowKeys &keys) = 0;
  virtual Status DeallocateCache(int64_t cache_id) = 0;
  virtual Status RemoveCacheKey(const CacheKey &key) = 0;

  // ---- transfers and copies, checks in the order of the Python API ----
  virtual Status Pull(const PullTarget &target, const Move &move) = 0;
  virtual Status PushLayer(const PushTarget &target, const CacheRef &dst, const Move &move) = 0;
  // One address of the peer's per tensor of the layer.
  virtual Status PushLayerToAddresses(const PushTarget &target, const std::vector<uint64_t> &dst_addrs,
                                      const Move &move) = 0;
  virtual Status CopyRow(const RowCopy &copy) = 0;
  virtual Status CopyBlocks(int64_t cache_id, const BlockMove &move) = 0;
  virtual Status CopyBlocksBetween(const CopySide &src, const CopySide &dst, uint64_t block_bytes,
                                   const BlockMove &move) = 0;
};

}  // namespace datadist

#endif  // DATADIST_PROVIDER_EXTENSION_H_
