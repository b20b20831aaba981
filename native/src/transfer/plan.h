// What a Pull or Push call moves: from the caller's arguments to tensor pairs and runs. Pure functions, no I/O.
//
// The engine calls them in the order in which the API promises its checks (pull: arguments, local cache, link, remote
// cache; push: arguments, link, remote cache, local cache), so each function checks one step and says in words what is
// wrong. Every failure here is LLM_PARAM_INVALID.
#ifndef DATADIST_TRANSFER_PLAN_H_
#define DATADIST_TRANSFER_PLAN_H_

#include <cstdint>
#include <vector>

#include "base/status.h"
#include "memory/region_table.h"
#include "transport/transport.h"

namespace datadist {

// Tensors [src_first, +count) of the source cache, paired in order with [dst_first, +count) of the destination.
struct TensorPairing {
  uint32_t src_first = 0;
  uint32_t dst_first = 0;
  uint32_t count = 0;
};

// ---- both directions ----

// Each bound >= -1, first <= last, tensor_num_per_layer > 0. A push also demands ranges of equal length.
Status CheckExtParam(const llm_datadist::KvCacheExtParam &ext);
Status CheckEqualLayerCounts(const llm_datadist::KvCacheExtParam &ext);

// Lists not empty and equally long.
Status CheckBlockLists(const std::vector<uint64_t> &src_blocks, const std::vector<uint64_t> &dst_blocks);

// Every index below geometry.num_blocks. `field` is what the caller calls the list: "src_blocks", "dst_blocks".
Status CheckBlockIndices(const char *field, const std::vector<uint64_t> &blocks, const CacheGeometry &geometry);

// One stride on both sides: with different ones a block index would mean different bytes.
Status CheckEqualStrides(const CacheGeometry &local, const CacheGeometry &remote);

// The lists as byte runs, in list order: a run grows while both indices are one above the previous ones. Nothing is
// sorted or dropped, so that where destinations repeat the last one wins. The indices must have been checked.
std::vector<Run> BuildBlockRuns(const std::vector<uint64_t> &remote_blocks, const std::vector<uint64_t> &local_blocks,
                                uint64_t stride);

// ---- pull: source is remote, destination local ----

// What layer ranges select, as far as it can be judged without the remote cache. If either range says "all" (-1), both
// do: then the pairing spans the local cache from its first tensor, and the remote cache must be as large.
struct PullSelection {
  bool all_tensors = true;
  TensorPairing tensors;
};
Result<PullSelection> SelectPullTensors(const llm_datadist::KvCacheExtParam &ext, const CacheGeometry &local);

// The selection against the remote cache: tensor counts, layer range and stride.
Status CheckPullSource(const PullSelection &selection, const CacheGeometry &local, const CacheGeometry &remote);

// ---- push: source is local, destination remote; one transfer per layer ----

// Source layer src_first + i goes to destination layer dst_first + i. Not yet checked against any cache: dst_first is
// -1 when the caller gave only the source range, which CheckPushDestination refuses.
struct PushLayers {
  int64_t src_first = 0;
  int64_t dst_first = 0;
  int64_t count = 0;
};

// `caller_num_tensors` is cache_desc.num_tensors as the caller filled it in: it decides the number of layers when no
// source range is given, and must then not be 0.
Result<PushLayers> SelectPushLayers(const llm_datadist::KvCacheExtParam &ext, uint32_t caller_num_tensors);

// Layer `index` (0 <= index < layers.count) against the remote and then the local cache.
Status CheckPushDestination(const PushLayers &layers, int64_t index, uint8_t tensors_per_layer,
                            const CacheGeometry &remote);
Result<TensorPairing> SelectPushTensors(const PushLayers &layers, int64_t index, uint8_t tensors_per_layer,
                                        const CacheGeometry &local);

}  // namespace datadist

#endif  // DATADIST_TRANSFER_PLAN_H_
