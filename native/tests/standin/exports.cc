// The symbols of CANN's libllm_datadist.so, by their mangled names: a class llm_datadist::LlmDataDist defined here
// would meet that of our engine in one library.
#include <string>
#include <utility>
#include <vector>

#include "endpoint.h"
#include "provider/cann/abi.h"
#include "symbols.h"

extern "C" const char *StandInText(const void *string);

namespace standin {
namespace {

namespace abi = datadist::cann;

Endpoint &Behind(abi::Object *object) { return *static_cast<Endpoint *>(object->impl); }

datadist::Options ToOptions(const abi::OptionMap &map) {
  datadist::Options options;
  for (const auto &[key, value] : map) {
    options.emplace(StandInText(&key), StandInText(&value));
  }
  return options;
}

std::vector<llm_datadist::IpInfo> ToIps(const std::vector<abi::IpInfo> &given) {
  std::vector<llm_datadist::IpInfo> ips;
  for (const abi::IpInfo &info : given) {
    ips.push_back({StandInText(&info.ip), info.port, {}});
  }
  return ips;
}

Clusters ToClusters(const std::vector<abi::ClusterInfo> &given) {
  Clusters clusters;
  for (const abi::ClusterInfo &info : given) {
    clusters.push_back({info.remote_cluster_id, info.remote_role_type, ToIps(info.local_ip_infos),
                        ToIps(info.remote_ip_infos), {}});
  }
  return clusters;
}

llm_datadist::CacheDesc ToDesc(const abi::CacheDesc &desc) {
  return {static_cast<llm_datadist::CachePlacement>(desc.placement), desc.num_tensors,
          static_cast<llm_datadist::DataType>(desc.data_type), desc.shape, {}};
}

// What the four transfers have in common.
template <typename Transfer>
Transfer ToTransfer(const abi::CacheIndex &remote, const abi::Cache &local, const abi::ExtParam &ext) {
  Transfer transfer;
  transfer.remote = {remote.cluster_id, remote.cache_id, remote.batch_index, {}};
  transfer.local.cache_id = local.cache_id;
  transfer.local.cache_desc = ToDesc(local.cache_desc);
  transfer.ext.src_layer_range = ext.src_layer_range;
  transfer.ext.dst_layer_range = ext.dst_layer_range;
  transfer.ext.tensor_num_per_layer = ext.tensor_num_per_layer;
  return transfer;
}

BlocksTransfer ToBlocks(const abi::CacheIndex &remote, const abi::Cache &local, const std::vector<uint64_t> &src,
                        const std::vector<uint64_t> &dst, const abi::ExtParam &ext) {
  auto transfer = ToTransfer<BlocksTransfer>(remote, local, ext);
  transfer.src_blocks = src;
  transfer.dst_blocks = dst;
  return transfer;
}

CacheTransfer ToRow(const abi::CacheIndex &remote, const abi::Cache &local, uint32_t row, int64_t size,
                    const abi::ExtParam &ext) {
  auto transfer = ToTransfer<CacheTransfer>(remote, local, ext);
  transfer.local_batch_index = row;
  transfer.size = size;
  return transfer;
}

}  // namespace

// A function behind the class that both of CANN's libraries export: where another library was loaded first, and this
// one without RTLD_DEEPBIND, a call from here ends there.
STANDIN_EXPORT Code LlmDataDist_ImplInitialize(abi::Object *object, const abi::OptionMap &options) {
  return Behind(object).Initialize(ToOptions(options));
}

STANDIN_EXPORT void LlmDataDist_Constructor(abi::Object *object, uint64_t cluster_id, int32_t role) {
  object->impl = new Endpoint(cluster_id, static_cast<llm_datadist::LlmRole>(role));
}

STANDIN_EXPORT void LlmDataDist_Destructor(abi::Object *object) {
  standin::Trace("Destructor", 0);
  delete &Behind(object);
}

STANDIN_EXPORT Code LlmDataDist_Initialize(abi::Object *object, const abi::OptionMap &options) {
  return LlmDataDist_ImplInitialize(object, options);
}

STANDIN_EXPORT void LlmDataDist_Finalize(abi::Object *object) { Behind(object).Finalize(); }

STANDIN_EXPORT Code LlmDataDist_SetRole(abi::Object *object, int32_t role, const abi::OptionMap &options) {
  return Behind(object).SetRole(static_cast<llm_datadist::LlmRole>(role), ToOptions(options));
}

STANDIN_EXPORT Code LlmDataDist_LinkLlmClusters(abi::Object *object, const std::vector<abi::ClusterInfo> &clusters,
                                                std::vector<Code> &rets, int32_t timeout_ms) {
  return Behind(object).Link(ToClusters(clusters), rets, timeout_ms);
}

STANDIN_EXPORT Code LlmDataDist_UnlinkLlmClusters(abi::Object *object, const std::vector<abi::ClusterInfo> &clusters,
                                                  std::vector<Code> &rets, int32_t timeout_ms, bool force) {
  return Behind(object).Unlink(ToClusters(clusters), rets, timeout_ms, force);
}

STANDIN_EXPORT Code LlmDataDist_RegisterKvCache(abi::Object *object, const abi::CacheDesc &desc,
                                                const std::vector<uint64_t> &addrs, const abi::RegisterCfg &,
                                                int64_t &cache_id) {
  return Behind(object).Register(ToDesc(desc), addrs, cache_id);
}

STANDIN_EXPORT Code LlmDataDist_UnregisterKvCache(abi::Object *object, int64_t cache_id) {
  return Behind(object).Unregister(cache_id);
}

STANDIN_EXPORT Code LlmDataDist_PullKvBlocks(abi::Object *object, const abi::CacheIndex &src, const abi::Cache &dst,
                                             const std::vector<uint64_t> &src_blocks,
                                             const std::vector<uint64_t> &dst_blocks, const abi::ExtParam &ext) {
  return Behind(object).PullBlocks(ToBlocks(src, dst, src_blocks, dst_blocks, ext));
}

STANDIN_EXPORT Code LlmDataDist_PushKvBlocks(abi::Object *object, const abi::Cache &src, const abi::CacheIndex &dst,
                                             const std::vector<uint64_t> &src_blocks,
                                             const std::vector<uint64_t> &dst_blocks, const abi::ExtParam &ext) {
  return Behind(object).PushBlocks(ToBlocks(dst, src, src_blocks, dst_blocks, ext));
}

STANDIN_EXPORT Code LlmDataDist_PullKvCache(abi::Object *object, const abi::CacheIndex &src, const abi::Cache &dst,
                                            uint32_t row, int64_t size, const abi::ExtParam &ext) {
  return Behind(object).PullCache(ToRow(src, dst, row, size, ext));
}

STANDIN_EXPORT Code LlmDataDist_PushKvCache(abi::Object *object, const abi::Cache &src, const abi::CacheIndex &dst,
                                            uint32_t row, int64_t size, const abi::ExtParam &ext) {
  return Behind(object).PushCache(ToRow(dst, src, row, size, ext));
}

// The four that CANN's library exports and never does.
STANDIN_EXPORT Code LlmDataDist_AllocateCache(abi::Object *, const abi::CacheDesc &, abi::Cache &) {
  return llm_datadist::LLM_FEATURE_NOT_ENABLED;
}

STANDIN_EXPORT Code LlmDataDist_DeallocateCache(abi::Object *, int64_t) {
  return llm_datadist::LLM_FEATURE_NOT_ENABLED;
}

STANDIN_EXPORT Code LlmDataDist_CopyKvCache(abi::Object *, const abi::Cache &, const abi::Cache &, uint32_t, uint32_t,
                                            uint64_t, int64_t) {
  return llm_datadist::LLM_FEATURE_NOT_ENABLED;
}

STANDIN_EXPORT Code LlmDataDist_CopyKvBlocks(abi::Object *, const abi::Cache &, const abi::Cache &,
                                             const std::vector<uint64_t> &,
                                             const std::vector<std::vector<uint64_t>> &) {
  return llm_datadist::LLM_FEATURE_NOT_ENABLED;
}

}  // namespace standin
