// The LLM-DataDist C++ API: move KV cache between the processes of a disaggregated LLM service.
//
// An `LlmDataDist` is one endpoint, known to its peers by `cluster_id`. The usual order of calls:
//
//   both ends   Initialize -> RegisterKvCache
//   client      LinkLlmClusters            (the server is the end with OPTION_LISTEN_IP_INFO)
//   either end  PullKvBlocks / PushKvBlocks / PullKvCache / PushKvCache, as often as wanted
//   client      UnlinkLlmClusters
//   both ends   UnregisterKvCache -> Finalize
//
// A cache is an ordered list of equally shaped tensors, layer-major; dimension 0 of the shape counts blocks (or
// batches). One block of one tensor is `tensor bytes / shape[0]` bytes long. Transfers are synchronous and need no
// call on the peer. Every call returns a status word; llm_datadist_ext.h tells the reason in words.
//
// Threads: calls may come from any thread. Finalize must not run beside other calls on the same object. Transfers on
// one link run one after another; different links run in parallel.
#ifndef LLM_DATADIST_LLM_DATADIST_H_
#define LLM_DATADIST_LLM_DATADIST_H_

#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "llm_datadist/ge_types.h"

// The class is visible from libllm_datadist.so and hidden where the engine is linked into another library: a process
// may also hold CANN's library, which exports the same names.
#if defined(LLM_DATADIST_STATIC)
#define LLM_DATADIST_API __attribute__((visibility("hidden")))
#else
#define LLM_DATADIST_API __attribute__((visibility("default")))
#endif

namespace llm_datadist {

using Status = ge::Status;
using AscendString = ge::AscendString;
using DataType = ge::DataType;
using ge::FAILED;
using ge::SUCCESS;

using ge::DT_BF16;
using ge::DT_BOOL;
using ge::DT_COMPLEX128;
using ge::DT_COMPLEX32;
using ge::DT_COMPLEX64;
using ge::DT_DOUBLE;
using ge::DT_DUAL;
using ge::DT_DUAL_SUB_INT8;
using ge::DT_DUAL_SUB_UINT8;
using ge::DT_FLOAT;
using ge::DT_FLOAT16;
using ge::DT_FLOAT4_E1M2;
using ge::DT_FLOAT4_E2M1;
using ge::DT_FLOAT6_E2M3;
using ge::DT_FLOAT6_E3M2;
using ge::DT_FLOAT8_E4M3FN;
using ge::DT_FLOAT8_E5M2;
using ge::DT_FLOAT8_E8M0;
using ge::DT_HIFLOAT8;
using ge::DT_INT16;
using ge::DT_INT2;
using ge::DT_INT32;
using ge::DT_INT4;
using ge::DT_INT64;
using ge::DT_INT8;
using ge::DT_QINT16;
using ge::DT_QINT32;
using ge::DT_QINT8;
using ge::DT_QUINT16;
using ge::DT_QUINT8;
using ge::DT_RESOURCE;
using ge::DT_STRING;
using ge::DT_STRING_REF;
using ge::DT_UINT1;
using ge::DT_UINT16;
using ge::DT_UINT2;
using ge::DT_UINT32;
using ge::DT_UINT64;
using ge::DT_UINT8;
using ge::DT_UNDEFINED;
using ge::DT_VARIANT;

// ---- options of Initialize and SetRole ----
constexpr char OPTION_LISTEN_IP_INFO[] = "llm.ListenIpInfo";              // "ip:port" or "[ipv6]:port"; makes a server
constexpr char OPTION_DEVICE_ID[] = "llm.DeviceId";                       // mandatory, non-negative int32
constexpr char OPTION_SYNC_CACHE_WAIT_TIME[] = "llm.SyncKvCacheWaitTime";  // transfer timeout in ms, default 1000
constexpr char OPTION_BUF_POOL_CFG[] = "llm.BufPoolCfg";                  // accepted, without effect
constexpr char OPTION_ENABLE_SET_ROLE[] = "llm.EnableSwitchRole";         // accepted, without effect
constexpr char OPTION_LOCAL_COMM_RES[] = "llm.LocalCommRes";              // JSON, checked when linking
constexpr char OPTION_TRANSFER_BACKEND[] = "llm.TransferBackend";         // absent or "hixl"
constexpr char OPTION_GLOBAL_RESOURCE_CONFIG[] = "llm.GlobalResourceConfig";

// ---- status codes ----
constexpr Status LLM_SUCCESS = 0x0U;
constexpr Status LLM_FAILED = 0xFFFFFFFFU;
constexpr Status LLM_WAIT_PROC_TIMEOUT = 0x5010B001U;
constexpr Status LLM_KV_CACHE_NOT_EXIST = 0x5010B002U;
constexpr Status LLM_PARAM_INVALID = 0x5010B005U;
constexpr Status LLM_NOT_YET_LINK = 0x5010B007U;
constexpr Status LLM_ALREADY_LINK = 0x5010B008U;
constexpr Status LLM_LINK_FAILED = 0x5010B009U;
constexpr Status LLM_UNLINK_FAILED = 0x5010B00AU;
constexpr Status LLM_NOTIFY_PROMPT_UNLINK_FAILED = 0x5010B00BU;
constexpr Status LLM_CLUSTER_NUM_EXCEED_LIMIT = 0x5010B00CU;
constexpr Status LLM_PROCESSING_LINK = 0x5010B00DU;
constexpr Status LLM_DEVICE_OUT_OF_MEMORY = 0x5010B00EU;
constexpr Status LLM_EXIST_LINK = 0x5010B018U;
constexpr Status LLM_FEATURE_NOT_ENABLED = 0x5010B019U;
constexpr Status LLM_TIMEOUT = 0x5010B01AU;
constexpr Status LLM_LINK_BUSY = 0x5010B01BU;
constexpr Status LLM_OUT_OF_MEMORY = 0x5010B01CU;

// A label only: it decides neither who may link nor who may transfer.
enum class LlmRole : int32_t { kPrompt = 1, kDecoder = 2, kMix = 3, kEnd };

// Host and device memory; on a host without devices both are ordinary memory and only checks tell them apart.
enum class CachePlacement : uint32_t { kHost = 0, kDevice = 1 };

// The structs below stay aggregates, members in this order: programs brace-initialise them.
struct IpInfo {
  AscendString ip;
  uint16_t port = 0;
  uint8_t reserved[128];
};

struct ClusterInfo {
  uint64_t remote_cluster_id = 0;  // 0: whoever answers
  int32_t remote_role_type = 0;    // without effect
  std::vector<IpInfo> local_ip_infos;
  std::vector<IpInfo> remote_ip_infos;
  uint8_t reserved[128];
};

// Names a remote cache.
struct CacheIndex {
  uint64_t cluster_id;
  int64_t cache_id;
  uint32_t batch_index;
  uint8_t reserved[128];
};

struct CacheDesc {
  CachePlacement placement = CachePlacement::kDevice;
  uint32_t num_tensors = 0;
  DataType data_type = DT_UNDEFINED;
  std::vector<int64_t> shape;
  uint8_t reserved[128];
};

struct Cache {
  int64_t cache_id = -1;
  std::vector<uintptr_t> tensor_addrs;
  CacheDesc cache_desc;
  uint8_t reserved[128];
};

// Layer ranges are inclusive and given for both sides, equally long; {-1, -1} in both means every layer. One side alone
// is LLM_PARAM_INVALID. Layer L owns tensors [L * tensor_num_per_layer, (L + 1) * tensor_num_per_layer); where every
// layer is meant, that number selects nothing and need not divide the tensors.
struct KvCacheExtParam {
  std::pair<int32_t, int32_t> src_layer_range = {-1, -1};
  std::pair<int32_t, int32_t> dst_layer_range = {-1, -1};
  uint8_t tensor_num_per_layer = 2;
  uint8_t reserved[127];
};

struct RegisterCfg {
  uint8_t reserved[128] = {0};
};

class LLM_DATADIST_API LlmDataDist {
 public:
  // cluster_id must be unique among all endpoints that link with one another.
  LlmDataDist(uint64_t cluster_id, LlmRole role);
  ~LlmDataDist();
  LlmDataDist(const LlmDataDist &) = delete;
  LlmDataDist &operator=(const LlmDataDist &) = delete;

  // Idempotent once successful; a failure leaves the object uninitialised and may be retried.
  Status Initialize(const std::map<AscendString, AscendString> &options);

  // Drops every link, registration and listener. Peers keep their half of a link until they unlink or relink.
  void Finalize();

  // Changes the role label and starts, moves or stops the listener. Refused with LLM_EXIST_LINK while links exist.
  Status SetRole(LlmRole role, const std::map<AscendString, AscendString> &options = {});

  // One status per cluster in `rets`, in order; the result is LLM_SUCCESS only if all succeeded. Links that were made
  // stay when others fail. The timeout covers each cluster's whole exchange; LLM_LINK_FAILED when it has passed.
  Status LinkLlmClusters(const std::vector<ClusterInfo> &clusters, std::vector<Status> &rets,
                         int32_t timeout_in_millis = 1000);

  // With force_flag only the local half is dropped and the peer is not contacted. An unknown link is a success.
  // LLM_UNLINK_FAILED when the peer cannot be reached or the timeout has passed; the link is kept.
  Status UnlinkLlmClusters(const std::vector<ClusterInfo> &clusters, std::vector<Status> &rets,
                           int32_t timeout_in_millis = 1000, bool force_flag = false);

  // A cache in memory of ours, from the pool of its placement (llm.MemPoolConfig, llm.HostMemPoolConfig; without such an
  // option as large as OPTION_MAX_DEVICE_BYTES and OPTION_MAX_HOST_BYTES allow): zeros, committed by the kernel when it
  // is first touched. LLM_DEVICE_OUT_OF_MEMORY (kDevice) or LLM_OUT_OF_MEMORY (kHost): the pool is exhausted.
  Status AllocateCache(const CacheDesc &cache_desc, Cache &cache);
  // Frees it once no transfer touches it any more. An unknown id, or a registered cache, is a success without effect.
  Status DeallocateCache(int64_t cache_id);

  // Reads row `src_cache_index.batch_index` of a remote cache into row `batch_index` of a local one: `size` bytes of
  // each tensor, -1 for a whole row.
  Status PullKvCache(const CacheIndex &src_cache_index, const Cache &dst_cache, uint32_t batch_index = 0U,
                     int64_t size = -1, const KvCacheExtParam &ext_param = {});

  // Reads remote block src_blocks[i] into local block dst_blocks[i], in list order, for every selected tensor.
  Status PullKvBlocks(const CacheIndex &src_cache_index, const Cache &dst_cache,
                      const std::vector<uint64_t> &src_blocks, const std::vector<uint64_t> &dst_blocks,
                      const KvCacheExtParam &ext_param = {});

  // Within this process, of caches registered or allocated, which it knows by their cache_id. CopyKvCache: `size` bytes
  // (-1: the rest of the source's row) of each tensor, at `offset` of both rows; the result of overlapping rows is
  // undefined. CopyKvBlocks: all src_blocks to each list of dst_blocks_list in turn, which is as long: src_blocks[i] of
  // every tensor goes to block [i] of the list. There, a cache whose cache_id is not above 0 is memory at its
  // tensor_addrs, as its cache_desc describes it.
  Status CopyKvCache(const Cache &src_cache, const Cache &dst_cache, uint32_t src_batch_index = 0U,
                     uint32_t dst_batch_index = 0U, uint64_t offset = 0U, int64_t size = -1);
  Status CopyKvBlocks(const Cache &src_cache, const Cache &dst_cache, const std::vector<uint64_t> &src_blocks,
                      const std::vector<std::vector<uint64_t>> &dst_blocks_list);

  // Writes row `src_batch_index` of a local cache into row `dst_cache_index.batch_index` of a remote one, layer by
  // layer; `size` must be -1. Of src_cache count cache_id, cache_desc.placement (kDevice) and cache_desc.num_tensors: how
  // many tensors are pushed where the layers are not given, 0 for those that are registered.
  Status PushKvCache(const Cache &src_cache, const CacheIndex &dst_cache_index, uint32_t src_batch_index = 0U,
                     int64_t size = -1, const KvCacheExtParam &ext_param = {});

  // Writes local block src_blocks[i] into remote block dst_blocks[i], layer by layer.
  Status PushKvBlocks(const Cache &src_cache, const CacheIndex &dst_cache_index,
                      const std::vector<uint64_t> &src_blocks, const std::vector<uint64_t> &dst_blocks,
                      const KvCacheExtParam &ext_param = {});

  // Makes caller-owned memory transferable: one address per tensor. Ids count from 1. The memory must stay valid until
  // UnregisterKvCache returned.
  Status RegisterKvCache(const CacheDesc &cache_desc, const std::vector<uint64_t> &addrs, const RegisterCfg &cfg,
                         int64_t &cache_id);

  // Returns when no transfer touches the memory any more. An unknown id is a success.
  Status UnregisterKvCache(int64_t cache_id);

 private:
  friend struct LlmDataDistAccess;
  class LlmDataDistImpl;
  std::unique_ptr<LlmDataDistImpl> impl_;
};

}  // namespace llm_datadist

#endif  // LLM_DATADIST_LLM_DATADIST_H_
