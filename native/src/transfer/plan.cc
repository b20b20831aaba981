#include "transfer/plan.h"

#include <string>
#include <utility>

#include "base/checked.h"

namespace datadist {
namespace {

using llm_datadist::KvCacheExtParam;
using LayerRange = std::pair<int32_t, int32_t>;

std::string Text(const LayerRange &range) {
  return "{" + std::to_string(range.first) + ", " + std::to_string(range.second) + "}";
}

bool IsAll(const LayerRange &range) { return range.first < 0; }

Status CheckLayerRange(const char *field, const LayerRange &range) {
  if (range.first < -1 || range.first > range.second || IsAll(range) != (range.second < 0)) {
    return Invalid(std::string(field) + " " + Text(range) + ": allowed are 0 <= first <= last, or {-1, -1} for all");
  }
  return Status::Ok();
}

Status CheckDivisible(const CacheGeometry &local, uint32_t tensors_per_layer) {
  if (local.num_tensors % tensors_per_layer != 0) {
    return Invalid("tensor_num_per_layer " + std::to_string(tensors_per_layer) + " does not divide the " +
                   std::to_string(local.num_tensors) + " tensors of the local cache");
  }
  return Status::Ok();
}

std::string Text(const LayerSpan &layers) {
  return std::to_string(layers.first) + ".." + std::to_string(layers.first + layers.count - 1);
}

// Layers as tensors; nothing when 64 bits do not hold them or there are none.
struct TensorSpan {
  uint64_t first = 0;
  uint64_t count = 0;
};
std::optional<TensorSpan> ToTensors(const LayerSpan &layers, uint32_t tensors_per_layer) {
  if (layers.first < 0 || layers.count <= 0) {
    return std::nullopt;
  }
  const auto first = CheckedMul(static_cast<uint64_t>(layers.first), tensors_per_layer);
  const auto count = CheckedMul(static_cast<uint64_t>(layers.count), tensors_per_layer);
  if (!first.has_value() || !count.has_value() || !RangeFits(*first, *count, UINT32_MAX)) {
    return std::nullopt;  // no cache has that many tensors
  }
  return TensorSpan{*first, *count};
}

Status LayersOutside(const char *field, const std::string &layers, uint32_t tensors_per_layer, const char *side,
                     uint32_t num_tensors) {
  return Invalid(std::string(field) + " " + layers + " with tensor_num_per_layer " +
                 std::to_string(tensors_per_layer) + " is outside the " + std::to_string(num_tensors) +
                 " tensors of the " + side + " cache");
}

}  // namespace

Status CheckExtParam(const KvCacheExtParam &ext) {
  if (Status status = CheckLayerRange("src_layer_range", ext.src_layer_range); !status.ok()) {
    return status;
  }
  if (Status status = CheckLayerRange("dst_layer_range", ext.dst_layer_range); !status.ok()) {
    return status;
  }
  if (ext.tensor_num_per_layer == 0) {
    return Invalid("tensor_num_per_layer 0: allowed is 1..255");
  }
  if (IsAll(ext.src_layer_range) != IsAll(ext.dst_layer_range)) {
    return Invalid("src_layer_range " + Text(ext.src_layer_range) + " and dst_layer_range " +
                   Text(ext.dst_layer_range) + ": allowed are two layer ranges, or {-1, -1} in both for all layers");
  }
  return Status::Ok();
}

Status CheckEqualLayerCounts(const KvCacheExtParam &ext) {
  const auto length = [](const LayerRange &range) { return int64_t{range.second} - range.first; };
  if (length(ext.src_layer_range) != length(ext.dst_layer_range)) {
    return Invalid("src_layer_range " + Text(ext.src_layer_range) + " and dst_layer_range " +
                   Text(ext.dst_layer_range) + " differ in length");
  }
  return Status::Ok();
}

Status CheckBlockLists(const std::vector<uint64_t> &src_blocks, const std::vector<uint64_t> &dst_blocks) {
  if (src_blocks.empty()) {
    return Invalid("src_blocks is empty: at least one block is needed");
  }
  if (src_blocks.size() != dst_blocks.size()) {
    return Invalid("src_blocks has " + std::to_string(src_blocks.size()) + " entries, dst_blocks " +
                   std::to_string(dst_blocks.size()) + ": they must be equally many");
  }
  return Status::Ok();
}

Status CheckHasBlocks(const char *field, const CacheGeometry &geometry) {
  if (geometry.num_blocks == 0) {
    return Invalid(std::string(field) + ": the cache is contiguous, it has no blocks");
  }
  return Status::Ok();
}

Status CheckBlockIndices(const char *field, const std::vector<uint64_t> &blocks, const CacheGeometry &geometry) {
  if (Status status = CheckHasBlocks(field, geometry); !status.ok()) {
    return status;
  }
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (blocks[i] >= geometry.num_blocks) {
      return Invalid(std::string(field) + "[" + std::to_string(i) + "] = " + std::to_string(blocks[i]) +
                     ": the cache has blocks 0.." + std::to_string(geometry.num_blocks - 1));
    }
  }
  return Status::Ok();
}

LayerChoice ChooseLayers(const KvCacheExtParam &ext) {
  LayerChoice choice;
  choice.tensors_per_layer = ext.tensor_num_per_layer;
  if (!IsAll(ext.src_layer_range)) {
    const auto span = [](const LayerRange &range) {
      return LayerSpan{range.first, int64_t{range.second} - range.first + 1};
    };
    choice.src = span(ext.src_layer_range);
    choice.dst = span(ext.dst_layer_range);
  }
  return choice;
}

Result<PullSelection> SelectPullTensors(const LayerChoice &layers, const CacheGeometry &local) {
  const uint32_t per_layer = layers.tensors_per_layer;
  if (per_layer == 0) {
    return Invalid("tensor_num_per_layer 0: allowed is above 0");
  }
  if (layers.src.has_value() || layers.dst.has_value()) {
    if (Status status = CheckDivisible(local, per_layer); !status.ok()) {
      return status;
    }
  }
  TensorSpan dst{0, local.num_tensors};
  if (layers.dst.has_value()) {
    const auto span = ToTensors(*layers.dst, per_layer);
    if (!span.has_value() || !RangeFits(span->first, span->count, local.num_tensors)) {
      return LayersOutside("dst_layer_range", Text(*layers.dst), per_layer, "local", local.num_tensors);
    }
    dst = *span;
  }
  TensorSpan src{0, dst.count};
  if (layers.src.has_value()) {
    const auto span = ToTensors(*layers.src, per_layer);
    if (!span.has_value()) {
      return Invalid("src_layer_range " + Text(*layers.src) + " is outside every cache");
    }
    if (span->count != dst.count) {
      return Invalid("src_layer_range " + Text(*layers.src) + " selects " + std::to_string(span->count) +
                     " tensors, the destination " + std::to_string(dst.count) + ": they must be equally many");
    }
    src = *span;
  }
  return PullSelection{!layers.src.has_value(),
                       {static_cast<uint32_t>(src.first), static_cast<uint32_t>(dst.first),
                        static_cast<uint32_t>(dst.count)}};
}

Status CheckPullSource(const PullSelection &selection, const CacheGeometry &remote) {
  const TensorPairing &tensors = selection.tensors;
  if (selection.whole_source && remote.num_tensors != tensors.count) {
    return Invalid("the remote cache has " + std::to_string(remote.num_tensors) + " tensors, the destination " +
                   std::to_string(tensors.count) + ": without a src_layer_range they must be equally many");
  }
  if (!RangeFits(tensors.src_first, tensors.count, remote.num_tensors)) {
    return Invalid("src_layer_range selects tensors " + std::to_string(tensors.src_first) + ".." +
                   std::to_string(uint64_t{tensors.src_first} + tensors.count - 1) + ", the remote cache has " +
                   std::to_string(remote.num_tensors));
  }
  return Status::Ok();
}

PushLayers SelectPushLayers(const KvCacheExtParam &ext, uint32_t num_tensors) {
  const uint32_t per_layer = ext.tensor_num_per_layer;
  const LayerRange &src = ext.src_layer_range;
  if (!IsAll(src)) {
    return {src.first, ext.dst_layer_range.first, int64_t{src.second} - src.first + 1, per_layer};
  }
  if (num_tensors % per_layer != 0) {
    return {0, 0, num_tensors, 1};
  }
  return {0, 0, num_tensors / per_layer, per_layer};
}

Status CheckPushDestination(int64_t dst_layer, uint32_t tensors_per_layer, const CacheGeometry &remote) {
  if (tensors_per_layer == 0 || dst_layer < 0 || dst_layer >= remote.num_tensors / tensors_per_layer) {
    return LayersOutside("dst layer", std::to_string(dst_layer), tensors_per_layer, "remote", remote.num_tensors);
  }
  return Status::Ok();
}

Status CheckPushSource(int64_t src_layer, uint32_t tensors_per_layer, const CacheGeometry &local) {
  if (tensors_per_layer == 0 || src_layer < 0 || src_layer >= local.num_tensors / tensors_per_layer) {
    return LayersOutside("src layer", std::to_string(src_layer), tensors_per_layer, "local", local.num_tensors);
  }
  return CheckDivisible(local, tensors_per_layer);
}

}  // namespace datadist
