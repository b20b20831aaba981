#include "transfer/plan.h"

#include <string>
#include <utility>

namespace datadist {
namespace {

using llm_datadist::KvCacheExtParam;
using LayerRange = std::pair<int32_t, int32_t>;

Status Invalid(std::string text) { return Status(llm_datadist::LLM_PARAM_INVALID, std::move(text)); }

std::string Text(const LayerRange &range) {
  return "{" + std::to_string(range.first) + ", " + std::to_string(range.second) + "}";
}

Status CheckLayerRange(const char *field, const LayerRange &range) {
  if (range.first < -1 || range.second < -1 || range.first > range.second) {
    return Invalid(std::string(field) + " " + Text(range) + ": allowed are 0 <= first <= last, or {-1, -1} for all");
  }
  return Status::Ok();
}

Status CheckDivisible(const CacheGeometry &local, uint8_t tensors_per_layer) {
  if (local.num_tensors % tensors_per_layer != 0) {
    return Invalid("tensor_num_per_layer " + std::to_string(tensors_per_layer) + " does not divide the " +
                   std::to_string(local.num_tensors) + " tensors of the local cache");
  }
  return Status::Ok();
}

// Layers of one range as tensors. 64 bits hold it: a layer is an int32 and a layer has at most 255 tensors.
struct TensorSpan {
  uint64_t first;
  uint64_t end;
};
TensorSpan SpanOf(const LayerRange &range, uint8_t tensors_per_layer) {
  return {static_cast<uint64_t>(range.first) * tensors_per_layer,
          (static_cast<uint64_t>(range.second) + 1) * tensors_per_layer};
}

Status LayersOutside(const char *field, const std::string &layers, uint8_t tensors_per_layer, const char *side,
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

Status CheckBlockIndices(const char *field, const std::vector<uint64_t> &blocks, const CacheGeometry &geometry) {
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (blocks[i] >= geometry.num_blocks) {
      return Invalid(std::string(field) + "[" + std::to_string(i) + "] = " + std::to_string(blocks[i]) +
                     ": the cache has blocks 0.." + std::to_string(geometry.num_blocks - 1));
    }
  }
  return Status::Ok();
}

Status CheckEqualStrides(const CacheGeometry &local, const CacheGeometry &remote) {
  if (local.stride != remote.stride) {
    return Invalid("block size differs: " + std::to_string(local.stride) + " bytes in the local cache, " +
                   std::to_string(remote.stride) + " in the remote cache");
  }
  return Status::Ok();
}

std::vector<Run> BuildBlockRuns(const std::vector<uint64_t> &remote_blocks, const std::vector<uint64_t> &local_blocks,
                                uint64_t stride) {
  std::vector<Run> runs;
  for (size_t i = 0; i < remote_blocks.size(); ++i) {
    if (i > 0 && remote_blocks[i] == remote_blocks[i - 1] + 1 && local_blocks[i] == local_blocks[i - 1] + 1) {
      runs.back().length += stride;
    } else {
      runs.push_back({remote_blocks[i] * stride, local_blocks[i] * stride, stride});
    }
  }
  return runs;
}

Result<PullSelection> SelectPullTensors(const KvCacheExtParam &ext, const CacheGeometry &local) {
  if (ext.src_layer_range.first < 0 || ext.dst_layer_range.first < 0) {
    return PullSelection{true, {0, 0, local.num_tensors}};
  }
  const uint8_t per_layer = ext.tensor_num_per_layer;
  if (Status status = CheckDivisible(local, per_layer); !status.ok()) {
    return status;
  }
  const TensorSpan dst = SpanOf(ext.dst_layer_range, per_layer);
  if (dst.end > local.num_tensors) {
    return LayersOutside("dst_layer_range", Text(ext.dst_layer_range), per_layer, "local", local.num_tensors);
  }
  if (Status status = CheckEqualLayerCounts(ext); !status.ok()) {
    return status;
  }
  const TensorSpan src = SpanOf(ext.src_layer_range, per_layer);
  if (src.end > UINT32_MAX) {  // no cache has that many tensors; the pairing holds 32 bits
    return Invalid("src_layer_range " + Text(ext.src_layer_range) + " is outside every cache");
  }
  return PullSelection{false,
                       {static_cast<uint32_t>(src.first), static_cast<uint32_t>(dst.first),
                        static_cast<uint32_t>(dst.end - dst.first)}};
}

Status CheckPullSource(const PullSelection &selection, const CacheGeometry &local, const CacheGeometry &remote) {
  const TensorPairing &tensors = selection.tensors;
  if (selection.all_tensors && remote.num_tensors != tensors.count) {
    return Invalid("the remote cache has " + std::to_string(remote.num_tensors) + " tensors, the local cache " +
                   std::to_string(tensors.count) + ": without layer ranges they must be equally many");
  }
  if (uint64_t{tensors.src_first} + tensors.count > remote.num_tensors) {
    return Invalid("src_layer_range selects tensors " + std::to_string(tensors.src_first) + ".." +
                   std::to_string(uint64_t{tensors.src_first} + tensors.count - 1) + ", the remote cache has " +
                   std::to_string(remote.num_tensors));
  }
  return CheckEqualStrides(local, remote);
}

Result<PushLayers> SelectPushLayers(const KvCacheExtParam &ext, uint32_t caller_num_tensors) {
  const LayerRange &src = ext.src_layer_range;
  if (src.first >= 0) {
    return PushLayers{src.first, ext.dst_layer_range.first, int64_t{src.second} - src.first + 1};
  }
  if (caller_num_tensors == 0) {
    return Invalid("cache_desc.num_tensors of the source cache is 0: without a src_layer_range it must be filled in");
  }
  // A last, incomplete layer is counted, so that it is refused and not silently left behind.
  const int64_t per_layer = ext.tensor_num_per_layer;
  return PushLayers{0, 0, (int64_t{caller_num_tensors} + per_layer - 1) / per_layer};
}

Status CheckPushDestination(const PushLayers &layers, int64_t index, uint8_t tensors_per_layer,
                            const CacheGeometry &remote) {
  const int64_t layer = layers.dst_first + index;
  if (layers.dst_first < 0 || layer >= remote.num_tensors / tensors_per_layer) {
    return LayersOutside("dst layer", std::to_string(layer), tensors_per_layer, "remote", remote.num_tensors);
  }
  return Status::Ok();
}

Result<TensorPairing> SelectPushTensors(const PushLayers &layers, int64_t index, uint8_t tensors_per_layer,
                                        const CacheGeometry &local) {
  const int64_t layer = layers.src_first + index;
  if (layer >= local.num_tensors / tensors_per_layer) {
    return LayersOutside("src layer", std::to_string(layer), tensors_per_layer, "local", local.num_tensors);
  }
  if (Status status = CheckDivisible(local, tensors_per_layer); !status.ok()) {
    return status;
  }
  return TensorPairing{static_cast<uint32_t>(layer) * tensors_per_layer,
                       static_cast<uint32_t>(layers.dst_first + index) * tensors_per_layer, tensors_per_layer};
}

}  // namespace datadist
