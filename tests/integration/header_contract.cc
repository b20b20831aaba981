// What programs compile against: numbers, keys, member order, defaults; in C++14, the oldest standard of the public
// headers. Compiling it checks most of it, running it the rest.
#include <type_traits>

#include "ge/llm_error_codes.h"
#include "llm_datadist/llm_datadist.h"
#include "llm_datadist/llm_datadist_ext.h"

using namespace llm_datadist;

namespace {

constexpr bool Same(const char *a, const char *b) { return *a == *b && (*a == '\0' || Same(a + 1, b + 1)); }

// ---- numbers ----
static_assert(DT_FLOAT == 0 && DT_FLOAT16 == 1 && DT_INT8 == 2 && DT_INT32 == 3 && DT_UINT8 == 4 && DT_INT16 == 6, "");
static_assert(DT_UINT16 == 7 && DT_UINT32 == 8 && DT_INT64 == 9 && DT_UINT64 == 10 && DT_DOUBLE == 11, "");
static_assert(DT_BOOL == 12 && DT_STRING == 13 && DT_DUAL_SUB_INT8 == 14 && DT_DUAL_SUB_UINT8 == 15, "");
static_assert(DT_COMPLEX64 == 16 && DT_COMPLEX128 == 17 && DT_QINT8 == 18 && DT_QINT16 == 19 && DT_QINT32 == 20, "");
static_assert(DT_QUINT8 == 21 && DT_QUINT16 == 22 && DT_RESOURCE == 23 && DT_STRING_REF == 24 && DT_DUAL == 25, "");
static_assert(DT_VARIANT == 26 && DT_BF16 == 27 && DT_UNDEFINED == 28 && DT_INT4 == 29 && DT_UINT1 == 30, "");
static_assert(DT_INT2 == 31 && DT_UINT2 == 32 && DT_COMPLEX32 == 33 && DT_HIFLOAT8 == 34 && DT_FLOAT8_E5M2 == 35, "");
static_assert(DT_FLOAT8_E4M3FN == 36 && DT_FLOAT8_E8M0 == 37 && DT_FLOAT6_E3M2 == 38 && DT_FLOAT6_E2M3 == 39, "");
static_assert(DT_FLOAT4_E2M1 == 40 && DT_FLOAT4_E1M2 == 41, "");

static_assert(LLM_SUCCESS == 0 && LLM_FAILED == 0xFFFFFFFF && LLM_WAIT_PROC_TIMEOUT == 0x5010B001, "");
static_assert(LLM_KV_CACHE_NOT_EXIST == 0x5010B002 && LLM_PARAM_INVALID == 0x5010B005, "");
static_assert(LLM_NOT_YET_LINK == 0x5010B007 && LLM_ALREADY_LINK == 0x5010B008, "");
static_assert(LLM_LINK_FAILED == 0x5010B009 && LLM_UNLINK_FAILED == 0x5010B00A, "");
static_assert(LLM_NOTIFY_PROMPT_UNLINK_FAILED == 0x5010B00B && LLM_CLUSTER_NUM_EXCEED_LIMIT == 0x5010B00C, "");
static_assert(LLM_PROCESSING_LINK == 0x5010B00D && LLM_DEVICE_OUT_OF_MEMORY == 0x5010B00E, "");
static_assert(LLM_EXIST_LINK == 0x5010B018 && LLM_FEATURE_NOT_ENABLED == 0x5010B019, "");
static_assert(LLM_TIMEOUT == 0x5010B01A && LLM_LINK_BUSY == 0x5010B01B && LLM_OUT_OF_MEMORY == 0x5010B01C, "");

static_assert(llm_datadist::SUCCESS == 0 && llm_datadist::FAILED == 0xFFFFFFFF, "");
static_assert(ge::LLM_TIMEOUT == llm_datadist::LLM_TIMEOUT && ge::LLM_SUCCESS == ge::SUCCESS, "");

static_assert(static_cast<int32_t>(LlmRole::kPrompt) == 1 && static_cast<int32_t>(LlmRole::kDecoder) == 2, "");
static_assert(static_cast<int32_t>(LlmRole::kMix) == 3 && static_cast<int32_t>(LlmRole::kEnd) == 4, "");
static_assert(static_cast<uint32_t>(CachePlacement::kHost) == 0, "");
static_assert(static_cast<uint32_t>(CachePlacement::kDevice) == 1, "");
static_assert(std::is_same<Status, uint32_t>::value, "");

// ---- keys ----
static_assert(Same(OPTION_LISTEN_IP_INFO, "llm.ListenIpInfo") && Same(OPTION_DEVICE_ID, "llm.DeviceId"), "");
static_assert(Same(OPTION_SYNC_CACHE_WAIT_TIME, "llm.SyncKvCacheWaitTime"), "");
static_assert(Same(OPTION_BUF_POOL_CFG, "llm.BufPoolCfg"), "");
static_assert(Same(OPTION_ENABLE_SET_ROLE, "llm.EnableSwitchRole"), "");
static_assert(Same(OPTION_LOCAL_COMM_RES, "llm.LocalCommRes"), "");
static_assert(Same(OPTION_TRANSFER_BACKEND, "llm.TransferBackend"), "");
static_assert(Same(OPTION_GLOBAL_RESOURCE_CONFIG, "llm.GlobalResourceConfig"), "");

// ---- aggregates, as programs spell them ----
void Compile(LlmDataDist &datadist, const char *ip, uint16_t port) {
  const ClusterInfo cluster{1, 0, {{ip, port}}, {{ip, port}}};
  const CacheIndex index{1, 2, 0U, {}};
  const KvCacheExtParam layers{{0, 1}, {0, 1}, 2, {}};
  const CacheDesc desc{CachePlacement::kHost, 10, DT_INT32, {4, 16}, {}};
  const Cache cache{1, {0x1000}, desc, {}};
  const std::map<AscendString, AscendString> options{{OPTION_DEVICE_ID, "0"}};

  // ---- default arguments and results ----
  std::vector<Status> rets;
  int64_t cache_id = 0;
  Cache allocated;
  const Status statuses[] = {
      datadist.Initialize(options),
      datadist.SetRole(LlmRole::kPrompt),
      datadist.LinkLlmClusters({cluster}, rets),
      datadist.UnlinkLlmClusters({cluster}, rets),
      datadist.AllocateCache(desc, allocated),
      datadist.DeallocateCache(cache_id),
      datadist.PullKvCache(index, cache),
      datadist.PullKvCache(index, cache, 0U, -1, layers),
      datadist.PullKvBlocks(index, cache, {0}, {1}),
      datadist.CopyKvCache(cache, cache),
      datadist.CopyKvBlocks(cache, cache, {0}, {{1}, {2}}),
      datadist.PushKvCache(cache, index),
      datadist.PushKvBlocks(cache, index, {0}, {1}, layers),
      datadist.RegisterKvCache(desc, {0x1000}, RegisterCfg{}, cache_id),
      datadist.UnregisterKvCache(cache_id),
  };
  static_cast<void>(statuses);
  static_assert(std::is_void<decltype(datadist.Finalize())>::value, "");
}

}  // namespace

int main() {
  const IpInfo ip{};
  const ClusterInfo cluster{};
  const CacheDesc desc{};
  const Cache cache{};
  const KvCacheExtParam layers{};
  const std::pair<int32_t, int32_t> all{-1, -1};
  const AscendString text = "abc";
  const bool defaults = ip.port == 0 && cluster.remote_cluster_id == 0 && cluster.remote_role_type == 0 &&
                        desc.placement == CachePlacement::kDevice && desc.num_tensors == 0 &&
                        desc.data_type == DT_UNDEFINED && cache.cache_id == -1 && layers.src_layer_range == all &&
                        layers.dst_layer_range == all && layers.tensor_num_per_layer == 2;
  const bool strings = text.GetLength() == 3 && Same(text.GetString(), "abc") && text == AscendString("abc") &&
                       text < AscendString("abd") && AscendString() == AscendString("") && AscendString() < text &&
                       !(text < AscendString());
  static_cast<void>(&Compile);
  return defaults && strings ? 0 : 1;
}
