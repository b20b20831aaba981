// Pull and push: the checks in the order that callers can see, then the bytes.
#include <algorithm>
#include <optional>
#include <utility>

#include "base/checked.h"
#include "engine/engine.h"

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

Status CheckDevicePlacement(const llm_datadist::CacheDesc &desc) {
  if (desc.placement != llm_datadist::CachePlacement::kDevice) {
    return Status(LLM_PARAM_INVALID, "src_cache.cache_desc.placement: " +
                                         std::to_string(static_cast<uint32_t>(desc.placement)) +
                                         ", allowed for a push: 1 (device)");
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

// With remote access on, only accessible caches take part in transfers, on either side; the owner judges the other.
Status CheckAccessible(const LinkOptions &options, const RegisteredCache &local) {
  if (options.remote_accessible && !local.remote_accessible()) {
    return Status(LLM_PARAM_INVALID, "local cache " + std::to_string(local.id()) + " is not remote accessible");
  }
  return Status::Ok();
}

// Says which side: the peer uses the same words of its own caches.
Result<CachePin> PinLocal(CacheRegistry &caches, int64_t id) {
  Result<CachePin> pin = caches.Pin(id);
  return pin.ok() ? std::move(pin) : Status(pin.status().code(), "local " + pin.status().text());
}

// Ids count from 1; the API looks up anything else as the key of request 0, model 0.
CacheRef ToRef(const CacheIndex &index) {
  return index.cache_id > 0 ? CacheRef::Id(index.cache_id) : CacheRef::Key(CacheKey{KeyKind::kRequest, 0, 0});
}

void SetSourceRow(Move &move, uint64_t row) {
  if (auto *rows = std::get_if<RowMove>(&move)) {
    rows->src_row = row;
  } else if (auto *pieces = std::get_if<PieceMove>(&move)) {
    pieces->src_row = row;
  }
}

std::vector<Run> PullRuns(const std::vector<ByteRun> &runs) {
  std::vector<Run> ordered;
  ordered.reserve(runs.size());
  for (const ByteRun &run : runs) {
    ordered.push_back({run.src_offset, run.dst_offset, run.length});
  }
  return ordered;
}

// `base`: where the destination begins in its tensor.
std::vector<Run> PushRuns(const std::vector<ByteRun> &runs, uint64_t base) {
  std::vector<Run> ordered;
  ordered.reserve(runs.size());
  for (const ByteRun &run : runs) {
    ordered.push_back({base + run.dst_offset, run.src_offset, run.length});
  }
  return ordered;
}

// Layers of a push that go together share one timeout, where the API gives each its own: no more bytes than a wire of
// 2 Mbit/s moves in it. What is more is large enough for its round trip to be of no account.
constexpr uint64_t kTogetherBytesPerS = 256ULL << 10;
constexpr uint64_t kTogetherBytes = 16ULL << 20;

uint64_t BytesTogether(std::chrono::milliseconds timeout) {
  const auto millis = static_cast<uint64_t>(std::max<int64_t>(timeout.count(), 0));
  return std::min(kTogetherBytes, CheckedMul(millis, kTogetherBytesPerS).value_or(UINT64_MAX) / 1000);
}

// Of the target's layers, the first of which both caches have: none that one of them lacks, so that what is before it
// is written when it fails.
int64_t LayersTogether(const PushTarget &target, const std::vector<ByteRun> &runs, const CacheGeometry &local,
                       const CacheGeometry &remote, std::chrono::milliseconds timeout) {
  uint64_t bytes = 0;
  for (const ByteRun &run : runs) {
    bytes = CheckedAdd(bytes, run.length).value_or(kTogetherBytes);
  }
  const uint64_t layer = std::max<uint64_t>(CheckedMul(bytes, target.tensors_per_layer).value_or(kTogetherBytes), 1);
  return std::min({target.layers, std::max<int64_t>(static_cast<int64_t>(BytesTogether(timeout) / layer), 1),
                   local.num_tensors / target.tensors_per_layer - target.src_layer,
                   remote.num_tensors / target.tensors_per_layer - target.dst_layer});
}

std::optional<std::chrono::milliseconds> LeftUntil(const std::optional<Deadline> &deadline) {
  return deadline.has_value() ? std::make_optional(deadline->Remaining()) : std::nullopt;
}

// The end of the last byte that the runs write, or nothing beyond 64 bits.
std::optional<uint64_t> DestinationEnd(const std::vector<ByteRun> &runs) {
  uint64_t last = 0;
  for (const ByteRun &run : runs) {
    const auto end = CheckedAdd(run.dst_offset, run.length);
    if (!end.has_value()) {
      return std::nullopt;
    }
    last = std::max(last, *end);
  }
  return last;
}

}  // namespace

// Not where a peer has our id, see MayBeCalled.
bool Engine::IsOurselves(uint64_t cluster_id) const {
  if (cluster_id != endpoint_->cluster_id()) {
    return false;
  }
  const std::shared_ptr<Link> link = table_->Find(cluster_id);
  return link == nullptr || link->peer_incarnation() == endpoint_->incarnation();
}

Deadline Engine::TransferDeadline(std::optional<std::chrono::milliseconds> time_left) const {
  const std::chrono::milliseconds timeout = endpoint_->options().transfer_timeout;
  return Deadline::In(std::min(timeout, time_left.value_or(timeout)));
}

// ---- pull ----

Status Engine::PullKvCache(const CacheIndex &src, int64_t dst_cache_id, uint32_t dst_row, int64_t size,
                           const KvCacheExtParam &ext) {
  if (Status status = FirstFailure({CheckRowSize(size), CheckExtParam(ext)}); !status.ok()) {
    return status;
  }
  RowMove rows;
  rows.dst_row = dst_row;
  rows.size = size;
  return Pull({src.cluster_id, ToRef(src), src.batch_index, dst_cache_id, ChooseLayers(ext)}, rows);
}

Status Engine::PullKvBlocks(const CacheIndex &src, int64_t dst_cache_id, const std::vector<uint64_t> &src_blocks,
                            const std::vector<uint64_t> &dst_blocks, const KvCacheExtParam &ext,
                            std::optional<std::chrono::milliseconds> time_left) {
  if (Status status = FirstFailure(
          {CheckNoBatch("src_cache_index", src), CheckExtParam(ext), CheckBlockLists(src_blocks, dst_blocks)});
      !status.ok()) {
    return status;
  }
  return Pull({src.cluster_id, ToRef(src), 0, dst_cache_id, ChooseLayers(ext), time_left},
              BlockMove{src_blocks, dst_blocks});
}

Status Engine::Pull(const PullTarget &target, Move move) {
  return statistics_->Count(Statistics::Call::kPull, [&] { return PullOnce(target, move); });
}

Status Engine::PullOnce(const PullTarget &target, Move &move) {
  const Deadline deadline = TransferDeadline(target.time_left);
  if (IsOurselves(target.src_cluster_id)) {
    return Status(LLM_PARAM_INVALID,
                  "src_cache_index.cluster_id: " + std::to_string(target.src_cluster_id) + " is our own");
  }
  const Result<CachePin> pin = PinLocal(*endpoint_->caches(), target.dst_cache_id);
  if (!pin.ok()) {
    return pin.status();
  }
  const CacheGeometry &local = pin.value().cache().geometry();
  const bool rows = std::holds_alternative<RowMove>(move);
  if (Status status = rows ? CheckDestination(move, local) : CheckHasBlocks("dst_blocks", local); !status.ok()) {
    return status;
  }
  const Result<PullSelection> selection = SelectPullTensors(target.layers, local);
  if (!selection.ok()) {
    return selection.status();
  }
  const Result<std::shared_ptr<Link>> link = FindLink(target.src_cluster_id);
  if (!link.ok()) {
    return link.status();
  }
  if (auto *pieces = std::get_if<PieceMove>(&move)) {
    pieces->piece_bytes = local.stride;
    if (Status status = CheckBlockIndices("dst_blocks", pieces->dst_blocks, local); !status.ok()) {
      return status;
    }
  } else if (Status status = CheckDestination(move, local); !status.ok()) {
    return status;
  }
  const auto plan = [&](const RemoteTarget &remote) -> Result<TransferOp> {
    const CacheGeometry &source = remote.cache.geometry;
    SetSourceRow(move, remote.has_row ? remote.row : target.src_row);
    if (Status status = FirstFailure({CheckAccessible(endpoint_->options(), pin.value().cache()),
                                      CheckPullSource(selection.value(), source), CheckSource(move, source)});
        !status.ok()) {
      return status;
    }
    const Result<std::vector<ByteRun>> runs =
        BuildRuns(move, source, local, LocalSide::kDestination, !endpoint_->options().remote_accessible);
    if (!runs.ok()) {
      return runs.status();
    }
    const TensorPairing &tensors = selection.value().tensors;
    TransferOp op;
    op.local = &pin.value();
    op.remote_first_tensor = tensors.src_first;
    op.local_first_tensor = tensors.dst_first;
    op.tensor_count = tensors.count;
    op.runs = PullRuns(runs.value());
    return op;
  };
  return link.value()->Transfer(TransferDirection::kPull, {{target.src, plan}}, deadline);
}

// ---- push ----

Status Engine::PushKvCache(const llm_datadist::Cache &src_cache, const CacheIndex &dst, uint32_t src_row, int64_t size,
                           const KvCacheExtParam &ext) {
  if (Status status = CheckDevicePlacement(src_cache.cache_desc); !status.ok()) {
    return status;
  }
  if (size != -1) {
    return Status(LLM_PARAM_INVALID, "size: " + std::to_string(size) + ", allowed for a push: -1, a whole row");
  }
  RowMove rows;
  rows.src_row = src_row;
  rows.dst_row = dst.batch_index;
  return PushLayers(src_cache, dst, rows, ext, std::nullopt);
}

Status Engine::PushKvBlocks(const llm_datadist::Cache &src_cache, const CacheIndex &dst,
                            const std::vector<uint64_t> &src_blocks, const std::vector<uint64_t> &dst_blocks,
                            const KvCacheExtParam &ext, std::optional<std::chrono::milliseconds> time_left) {
  if (Status status = FirstFailure({CheckDevicePlacement(src_cache.cache_desc),
                                    CheckBlockLists(src_blocks, dst_blocks), CheckNoBatch("dst_cache_index", dst)});
      !status.ok()) {
    return status;
  }
  return PushLayers(src_cache, dst, BlockMove{src_blocks, dst_blocks}, ext, time_left);
}

// Layers go in their order, as many together as share one timeout, within what is left for the call; the first that
// fails ends it, and those before it are written.
Status Engine::PushLayers(const llm_datadist::Cache &src_cache, const CacheIndex &dst, const Move &move,
                          const KvCacheExtParam &ext, std::optional<std::chrono::milliseconds> time_left) {
  const auto call_deadline = time_left.has_value() ? std::make_optional(Deadline::In(*time_left)) : std::nullopt;
  if (Status status = FirstFailure({CheckExtParam(ext), CheckEqualLayerCounts(ext)}); !status.ok()) {
    return status;
  }
  uint32_t num_tensors = src_cache.cache_desc.num_tensors;
  if (num_tensors == 0) {  // the caller filled in no more than the id
    const Result<CachePin> pin = PinLocal(*endpoint_->caches(), src_cache.cache_id);
    if (!pin.ok()) {
      return pin.status();
    }
    num_tensors = pin.value().cache().geometry().num_tensors;
  }
  const datadist::PushLayers layers = SelectPushLayers(ext, num_tensors);
  const CacheRef remote = ToRef(dst);
  PushTarget target{src_cache.cache_id, layers.src_first, dst.cluster_id, layers.dst_first, layers.tensors_per_layer,
                    layers.count};
  while (target.layers > 0) {
    target.time_left = LeftUntil(call_deadline);
    const Result<int64_t> pushed = PushSome(target, remote, move);
    if (!pushed.ok()) {
      return pushed.status();
    }
    target.src_layer += pushed.value();
    target.dst_layer += pushed.value();
    target.layers -= pushed.value();
  }
  return Status::Ok();
}

Status Engine::PushLayer(const PushTarget &target, const CacheRef &dst, const Move &move) {
  const Result<int64_t> pushed = PushSome(target, dst, move);
  return pushed.ok() ? Status::Ok() : pushed.status();
}

Result<int64_t> Engine::PushSome(const PushTarget &target, const CacheRef &dst, Move move) {
  int64_t layers = 0;
  const Status status =
      statistics_->Count(Statistics::Call::kPush, [&] { return PushTogether(target, dst, move, layers); });
  return status.ok() ? Result<int64_t>(layers) : status;
}

// As many of the target's layers as go together, the first at least: how many is known once the remote cache is.
Status Engine::PushTogether(const PushTarget &target, const CacheRef &dst, Move &move, int64_t &layers) {
  const Deadline deadline = TransferDeadline(target.time_left);
  const Result<CachePin> pin = PinLocal(*endpoint_->caches(), target.src_cache_id);
  if (!pin.ok()) {
    return pin.status();
  }
  const Result<std::shared_ptr<Link>> link = FindLink(target.dst_cluster_id);
  if (!link.ok()) {
    return link.status();
  }
  const CacheGeometry &local = pin.value().cache().geometry();
  const auto plan = [&](const RemoteTarget &remote) -> Result<TransferOp> {
    const CacheGeometry &destination = remote.cache.geometry;
    if (auto *rows = std::get_if<RowMove>(&move); rows != nullptr && remote.has_row) {
      rows->dst_row = remote.row;
    }
    if (Status status = FirstFailure({CheckAccessible(endpoint_->options(), pin.value().cache()),
                                      CheckPushDestination(target.dst_layer, target.tensors_per_layer, destination),
                                      CheckDestination(move, destination),
                                      CheckPushSource(target.src_layer, target.tensors_per_layer, local),
                                      CheckPushedPieces(move, local), CheckSource(move, local)});
        !status.ok()) {
      return status;
    }
    const Result<std::vector<ByteRun>> runs = BuildRuns(move, local, destination, LocalSide::kSource, false);
    if (!runs.ok()) {
      return runs.status();
    }
    layers = LayersTogether(target, runs.value(), local, destination, deadline.Remaining());
    TransferOp op;
    op.local = &pin.value();
    op.remote_first_tensor = static_cast<uint32_t>(target.dst_layer) * target.tensors_per_layer;
    op.local_first_tensor = static_cast<uint32_t>(target.src_layer) * target.tensors_per_layer;
    op.tensor_count = static_cast<uint32_t>(layers) * target.tensors_per_layer;
    op.runs = PushRuns(runs.value(), 0);
    return op;
  };
  const Status status = link.value()->Transfer(TransferDirection::kPush, {{dst, plan}}, deadline);
  return status.ok() ? status
                     : Status(status.code(), "layer " + std::to_string(target.src_layer) + ": " + status.text());
}

Status Engine::PushLayerToAddresses(const PushTarget &target, const std::vector<uint64_t> &dst_addrs,
                                    const Move &move) {
  const Deadline deadline = Deadline::In(endpoint_->options().transfer_timeout);
  const Result<CachePin> pin = PinLocal(*endpoint_->caches(), target.src_cache_id);
  if (!pin.ok()) {
    return pin.status();
  }
  const Result<std::shared_ptr<Link>> link = FindLink(target.dst_cluster_id);
  if (!link.ok()) {
    return link.status();
  }
  const CacheGeometry &local = pin.value().cache().geometry();
  if (Status status = FirstFailure({CheckPushSource(target.src_layer, target.tensors_per_layer, local),
                                    CheckPushedPieces(move, local), CheckSource(move, local)});
      !status.ok()) {
    return status;
  }
  if (dst_addrs.size() != target.tensors_per_layer) {
    return Status(LLM_PARAM_INVALID, "dst_addrs has " + std::to_string(dst_addrs.size()) + " entries for a layer of " +
                                         std::to_string(target.tensors_per_layer) + " tensors");
  }
  const Result<std::vector<ByteRun>> runs = BuildRunsToAddress(move, local);
  if (!runs.ok()) {
    return runs.status();
  }
  const std::optional<uint64_t> extent = DestinationEnd(runs.value());
  if (!extent.has_value()) {
    return Status(LLM_PARAM_INVALID, "the destination exceeds 64 bits");
  }
  std::vector<Link::Part> parts;
  for (uint32_t i = 0; i < target.tensors_per_layer; ++i) {
    const uint32_t tensor = static_cast<uint32_t>(target.src_layer) * target.tensors_per_layer + i;
    parts.push_back({CacheRef::Address(dst_addrs[i], *extent), [&, tensor](const RemoteTarget &remote) {
                       TransferOp op;
                       op.local = &pin.value();
                       op.remote_first_tensor = remote.tensor;
                       op.local_first_tensor = tensor;
                       op.tensor_count = 1;
                       op.runs = PushRuns(runs.value(), remote.offset);
                       return Result<TransferOp>(std::move(op));
                     }});
  }
  const Status status = link.value()->Transfer(TransferDirection::kPush, parts, deadline);
  return status.ok() ? status
                     : Status(status.code(), "layer " + std::to_string(target.src_layer) + ": " + status.text());
}

}  // namespace datadist
