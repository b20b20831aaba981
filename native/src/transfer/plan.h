// Which tensors a Pull or Push call pairs, from the caller's layers; which bytes of each pair, see moves.h. Pure
// functions, no I/O.
//
// The engine calls them in the order in which the API promises its checks (pull: arguments, local cache, link, remote
// cache; push: arguments, link, remote cache, local cache), so each function checks one step and says in words what is
// wrong. Every failure here is LLM_PARAM_INVALID.
#ifndef DATADIST_TRANSFER_PLAN_H_
#define DATADIST_TRANSFER_PLAN_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "base/status.h"
#include "memory/region_table.h"

namespace datadist {

// Tensors [src_first, +count) of the source cache, paired in order with [dst_first, +count) of the destination.
struct TensorPairing {
  uint32_t src_first = 0;
  uint32_t dst_first = 0;
  uint32_t count = 0;
};

// ---- both directions ----

// Two ranges 0 <= first <= last, or {-1, -1} twice: where only one range counted, every layer would be written. And
// tensor_num_per_layer > 0. A push also demands ranges of equal length.
Status CheckExtParam(const llm_datadist::KvCacheExtParam &ext);
Status CheckEqualLayerCounts(const llm_datadist::KvCacheExtParam &ext);

// Lists not empty and equally long.
Status CheckBlockLists(const std::vector<uint64_t> &src_blocks, const std::vector<uint64_t> &dst_blocks);

// The cache has blocks at all: a contiguous one has not.
Status CheckHasBlocks(const char *field, const CacheGeometry &geometry);
// Every index below geometry.num_blocks. `field` is what the caller calls the list: "src_blocks", "dst_blocks".
Status CheckBlockIndices(const char *field, const std::vector<uint64_t> &blocks, const CacheGeometry &geometry);

// ---- layers of a pull: source is remote, destination local ----

struct LayerSpan {
  int64_t first = 0;
  int64_t count = 0;
};

// The layers that a caller chose; without a span: all tensors of that side.
struct LayerChoice {
  std::optional<LayerSpan> src;
  std::optional<LayerSpan> dst;
  uint32_t tensors_per_layer = 2;
};

// Of an ext param that passed CheckExtParam.
LayerChoice ChooseLayers(const llm_datadist::KvCacheExtParam &ext);

// What a choice selects, as far as it can be judged without the remote cache. `whole_source`: the pairing begins at the
// source's first tensor, and the remote cache must have just as many.
struct PullSelection {
  bool whole_source = true;
  TensorPairing tensors;
};
Result<PullSelection> SelectPullTensors(const LayerChoice &layers, const CacheGeometry &local);

// The selection against the remote cache: tensor counts and layer range.
Status CheckPullSource(const PullSelection &selection, const CacheGeometry &remote);

// ---- layers of a push: source is local, destination remote; one transfer per layer ----

// Source layer src_first + i goes to destination layer dst_first + i. Not yet checked against any cache.
struct PushLayers {
  int64_t src_first = 0;
  int64_t dst_first = 0;
  int64_t count = 0;
  uint32_t tensors_per_layer = 2;
};

// Of an ext param that passed CheckExtParam. Without ranges all of `num_tensors`; where the layers do not divide them,
// tensor by tensor: tensor_num_per_layer then selects nothing.
PushLayers SelectPushLayers(const llm_datadist::KvCacheExtParam &ext, uint32_t num_tensors);

// One layer against the remote cache, then against the local one.
Status CheckPushDestination(int64_t dst_layer, uint32_t tensors_per_layer, const CacheGeometry &remote);
Status CheckPushSource(int64_t src_layer, uint32_t tensors_per_layer, const CacheGeometry &local);

}  // namespace datadist

#endif  // DATADIST_TRANSFER_PLAN_H_
