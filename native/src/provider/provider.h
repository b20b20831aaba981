// One endpoint of the LLM-DataDist API, whoever implements it: the seam between bindings and engines.
//
//   bindings, TransferQueue ──> Provider ──┬── engine.cc   our engine, linked in; it alone has the Extension
//                                          └── cann/       that of CANN, found at run time
//
// The members are those of llm_datadist::LlmDataDist with their semantics, plus what llm_datadist_ext.h adds. The reason
// of a failure travels in the Status instead of a thread-local text, so that it survives a change of threads; a provider
// that has no reason to tell leaves the text empty. Types are those of our public header: a provider of another library
// translates, because that library's own strings and structs have another layout.
//
// Implementor's contract: calls may come from any thread; every call that can wait for a peer is bounded by its own
// timeout; Finalize may be called again and before Initialize, and beside running calls, which it ends or waits for; no
// call throws.
#ifndef DATADIST_PROVIDER_PROVIDER_H_
#define DATADIST_PROVIDER_PROVIDER_H_

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"
#include "llm_datadist/llm_datadist.h"
#include "llm_datadist/llm_datadist_ext.h"
#include "provider/capabilities.h"

namespace datadist {

using Options = std::map<std::string, std::string>;

// Arguments of the four transfers. `local` is the cache id (and, for push, placement and tensor count) on this side.
struct BlocksTransfer {
  llm_datadist::CacheIndex remote{};
  llm_datadist::Cache local;
  std::vector<uint64_t> src_blocks;
  std::vector<uint64_t> dst_blocks;
  llm_datadist::KvCacheExtParam ext;
  // The call gives up after so long, or after what the options say if that is sooner. A provider of another library, whose
  // calls take no such limit, knows its options alone.
  std::optional<std::chrono::milliseconds> time_left = std::nullopt;
};

struct CacheTransfer {
  llm_datadist::CacheIndex remote{};
  llm_datadist::Cache local;
  uint32_t local_batch_index = 0;
  int64_t size = -1;
  llm_datadist::KvCacheExtParam ext;
};

class Extension;

class Provider {
 public:
  virtual ~Provider() = default;

  virtual Capabilities capabilities() const = 0;

  // Once on each thread that will call, before it does: a provider may keep a device per thread.
  virtual Status EnterThread() = 0;

  virtual Status Initialize(const Options &options) = 0;
  virtual void Finalize() = 0;
  virtual Status SetRole(llm_datadist::LlmRole role, const Options &options) = 0;

  // `rets`: one status per cluster in order, or empty when the call itself was refused.
  virtual Status Link(const std::vector<llm_datadist::ClusterInfo> &clusters, std::vector<llm_datadist::Status> &rets,
                      int32_t timeout_ms) = 0;
  virtual Status Unlink(const std::vector<llm_datadist::ClusterInfo> &clusters, std::vector<llm_datadist::Status> &rets,
                        int32_t timeout_ms, bool force) = 0;

  virtual Result<int64_t> RegisterKvCache(const llm_datadist::CacheDesc &desc, const std::vector<uint64_t> &addrs) = 0;
  virtual Status UnregisterKvCache(int64_t cache_id) = 0;

  virtual Status PullKvBlocks(const BlocksTransfer &transfer) = 0;
  virtual Status PushKvBlocks(const BlocksTransfer &transfer) = 0;
  virtual Status PullKvCache(const CacheTransfer &transfer) = 0;
  virtual Status PushKvCache(const CacheTransfer &transfer) = 0;

  // As in llm_datadist_ext.h. As they are, of a provider whose peers write wherever they like.
  virtual Result<uint64_t> GrantWrites(uint64_t, const std::vector<llm_datadist::WritableBlocks> &) {
    return Status(llm_datadist::LLM_FEATURE_NOT_ENABLED, "GrantWrites: not of this provider");
  }
  virtual Status RevokeWrites(uint64_t) {
    return Status(llm_datadist::LLM_FEATURE_NOT_ENABLED, "RevokeWrites: not of this provider");
  }

  // LLM_FEATURE_NOT_ENABLED where the provider cannot tell.
  virtual Result<uint16_t> ListenPort() = 0;
  virtual Result<llm_datadist::LinkReport> QueryLink(uint64_t cluster_id) = 0;
  // All with which there is a link, whoever made it.
  virtual Result<std::vector<uint64_t>> LinkedClusters() {
    return Status(llm_datadist::LLM_FEATURE_NOT_ENABLED, "LinkedClusters: this provider tells nothing of its links");
  }
  // Waits as long as it takes, and no longer than until Finalize.
  virtual Result<llm_datadist::HugePagesReport> WaitForHugePages() = 0;

  // What the Python API offers beyond this; lives as long as the provider. Null where there is none.
  virtual Extension *extension() { return nullptr; }
};

// Names that MakeProvider accepts in this process, preferred first: "engine", and "cann" where its library can be loaded.
std::vector<std::string> ProviderNames();

// LLM_PARAM_INVALID, naming what there is, for any other name. LLM_FAILED says why there is no "cann" here.
Result<std::unique_ptr<Provider>> MakeProvider(const std::string &name, uint64_t cluster_id,
                                               llm_datadist::LlmRole role);

// With an extension(), and the defaults of the Python API.
std::unique_ptr<Provider> MakeExtendedProvider(uint64_t cluster_id, llm_datadist::LlmRole role);

}  // namespace datadist

#endif  // DATADIST_PROVIDER_PROVIDER_H_
