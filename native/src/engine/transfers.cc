// Pull and push: the checks in the order that callers can see, then the bytes.
#include <algorithm>
#include <utility>

#include "engine/engine.h"
#include "transfer/plan.h"

namespace datadist {
namespace {

using llm_datadist::CacheIndex;
using llm_datadist::KvCacheExtParam;
using llm_datadist::LLM_PARAM_INVALID;

Status CheckNoBatch(const char *field, const CacheIndex &index) {
  if (index.batch_index != 0) {
    return Status(LLM_PARAM_INVALID, std::string(field) + ".batch_index: " + std::to_string(index.batch_index) +
                                         ", allowed: 0 when moving blocks");
  }
  return Status::Ok();
}

Status FirstFailure(std::initializer_list<Status> checks) {
  for (const Status &status : checks) {
    if (!status.ok()) {
      return status;
    }
  }
  return Status::Ok();
}

}  // namespace

Status Engine::PullKvBlocks(const CacheIndex &src, int64_t dst_cache_id, const std::vector<uint64_t> &src_blocks,
                            const std::vector<uint64_t> &dst_blocks, const KvCacheExtParam &ext) {
  const Deadline deadline = Deadline::In(endpoint_->options().transfer_timeout);
  if (Status status = FirstFailure(
          {CheckNoBatch("src_cache_index", src), CheckExtParam(ext), CheckBlockLists(src_blocks, dst_blocks)});
      !status.ok()) {
    return status;
  }
  if (src.cluster_id == endpoint_->cluster_id()) {
    return Status(LLM_PARAM_INVALID, "src_cache_index.cluster_id: " + std::to_string(src.cluster_id) + " is our own");
  }
  const Result<CachePin> pin = endpoint_->regions()->Pin(dst_cache_id);
  if (!pin.ok()) {
    return pin.status();
  }
  const CacheGeometry &local = pin.value().cache().geometry();
  const Result<PullSelection> selection = SelectPullTensors(ext, local);
  if (!selection.ok()) {
    return selection.status();
  }
  const Result<std::shared_ptr<Link>> link = FindLink(src.cluster_id);
  if (!link.ok()) {
    return link.status();
  }
  if (Status status = CheckBlockIndices("dst_blocks", dst_blocks, local); !status.ok()) {
    return status;
  }
  const auto plan = [&](const RemoteCache &remote) -> Result<TransferOp> {
    if (Status status = FirstFailure({CheckPullSource(selection.value(), local, remote.geometry),
                                      CheckBlockIndices("src_blocks", src_blocks, remote.geometry)});
        !status.ok()) {
      return status;
    }
    const TensorPairing &tensors = selection.value().tensors;
    TransferOp op;
    op.local = &pin.value();
    op.remote_first_tensor = tensors.src_first;
    op.local_first_tensor = tensors.dst_first;
    op.tensor_count = tensors.count;
    op.runs = BuildBlockRuns(src_blocks, dst_blocks, local.stride);
    return op;
  };
  return link.value()->Transfer(TransferDirection::kPull, src.cache_id, plan, deadline);
}

Status Engine::PushKvBlocks(const llm_datadist::Cache &src_cache, const CacheIndex &dst,
                            const std::vector<uint64_t> &src_blocks, const std::vector<uint64_t> &dst_blocks,
                            const KvCacheExtParam &ext) {
  if (src_cache.cache_desc.placement != llm_datadist::CachePlacement::kDevice) {
    return Status(LLM_PARAM_INVALID, "src_cache.cache_desc.placement: " +
                                         std::to_string(static_cast<uint32_t>(src_cache.cache_desc.placement)) +
                                         ", allowed for a push: 1 (device)");
  }
  if (Status status = FirstFailure({CheckBlockLists(src_blocks, dst_blocks), CheckNoBatch("dst_cache_index", dst),
                                    CheckExtParam(ext), CheckEqualLayerCounts(ext)});
      !status.ok()) {
    return status;
  }
  const Result<PushLayers> layers = SelectPushLayers(ext, src_cache.cache_desc.num_tensors);
  if (!layers.ok()) {
    return layers.status();
  }
  // Each layer is a transfer of its own, with a timeout of its own; the first that fails ends the call.
  for (int64_t layer = 0; layer < layers.value().count; ++layer) {
    const Deadline deadline = Deadline::In(endpoint_->options().transfer_timeout);
    const Result<CachePin> pin = endpoint_->regions()->Pin(src_cache.cache_id);
    if (!pin.ok()) {
      return pin.status();
    }
    const Result<std::shared_ptr<Link>> link = FindLink(dst.cluster_id);
    if (!link.ok()) {
      return link.status();
    }
    const CacheGeometry &local = pin.value().cache().geometry();
    const uint8_t per_layer = ext.tensor_num_per_layer;
    const auto plan = [&](const RemoteCache &remote) -> Result<TransferOp> {
      if (Status status = FirstFailure({CheckPushDestination(layers.value(), layer, per_layer, remote.geometry),
                                        CheckBlockIndices("dst_blocks", dst_blocks, remote.geometry)});
          !status.ok()) {
        return status;
      }
      const Result<TensorPairing> tensors = SelectPushTensors(layers.value(), layer, per_layer, local);
      if (!tensors.ok()) {
        return tensors.status();
      }
      if (Status status = FirstFailure(
              {CheckBlockIndices("src_blocks", src_blocks, local), CheckEqualStrides(local, remote.geometry)});
          !status.ok()) {
        return status;
      }
      TransferOp op;
      op.local = &pin.value();
      op.remote_first_tensor = tensors.value().dst_first;
      op.local_first_tensor = tensors.value().src_first;
      op.tensor_count = tensors.value().count;
      op.runs = BuildBlockRuns(dst_blocks, src_blocks, local.stride);
      return op;
    };
    if (Status status = link.value()->Transfer(TransferDirection::kPush, dst.cache_id, plan, deadline); !status.ok()) {
      return Status(status.code(), "layer " + std::to_string(layers.value().src_first + layer) + ": " + status.text());
    }
  }
  return Status::Ok();
}

}  // namespace datadist
