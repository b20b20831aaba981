// The initiator's side of a link: what we ask of the peer's memory. On the callers' threads, one transfer at a time.
#include <algorithm>
#include <utility>

#include "base/log.h"
#include "link/digests.h"
#include "link/link.h"
#include "transport/pieces.h"

namespace datadist {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_KV_CACHE_NOT_EXIST;
using llm_datadist::LLM_NOT_YET_LINK;
using llm_datadist::LLM_TIMEOUT;

Status Link::Transfer(TransferDirection direction, const std::vector<Part> &parts, Deadline deadline) {
  if (Status status = CheckUsable(); !status.ok()) {
    return status;
  }
  switch (gate_.Enter(deadline)) {
    case EnterResult::kEntered:
      break;
    case EnterResult::kTimeout:
      return Status(LLM_TIMEOUT, Name() + ": no turn in time, another transfer is running");
    case EnterResult::kShut: {
      const Status status = CheckUsable();
      return status.ok() ? Status(LLM_NOT_YET_LINK, Name() + " is being unlinked") : status;
    }
  }
  const Turn turn(gate_);
  if (Status status = CheckUsable(); !status.ok()) {
    return status;  // lost while waiting for the turn
  }
  const Status status = RunTransfer(direction, parts, deadline);
  if (status.ok()) {
    return status;
  }
  if (status.code() == LLM_TIMEOUT || status.code() == LLM_FAILED) {
    // Nobody knows how far the peer got: the documented contract is that the link must be made anew.
    Lose(CloseCause::kByUs, "a transfer failed: " + status.text());
  }
  return Status(status.code(), Name() + ": " + status.text());
}

Status Link::RunTransfer(TransferDirection direction, const std::vector<Part> &parts, Deadline deadline) {
  std::vector<PlannedPart> planned;
  for (const Part &part : parts) {
    Result<PlannedPart> made = PlanPart(part, deadline);
    if (!made.ok()) {
      return made.status();
    }
    planned.push_back(std::move(made).value());
  }
  for (size_t i = 0; i < parts.size(); ++i) {
    const Status status = MovePart(direction, parts[i].remote, planned[i], deadline);
    if (status.code() == LLM_KV_CACHE_NOT_EXIST) {
      described_.erase(parts[i].remote.cache_id);
    }
    if (!status.ok()) {
      return status;
    }
  }
  return Status::Ok();
}

Result<Link::PlannedPart> Link::PlanPart(const Part &part, Deadline deadline) {
  PlannedPart planned;
  planned.remembered = part.remote.by == CacheRef::By::kId && described_.count(part.remote.cache_id) != 0;
  const auto target = DescribeRemote(part.remote, deadline);
  if (!target.ok()) {
    return target.status();
  }
  planned.target = target.value();
  Result<TransferOp> op = part.planner(*planned.target);
  if (!op.ok() && planned.remembered) {
    // The cache may be gone by now, which is to be said before that its numbers are wrong.
    described_.erase(part.remote.cache_id);
    return PlanPart(part, deadline);
  }
  if (!op.ok()) {
    return op.status();
  }
  planned.op = std::move(op).value();
  planned.op.remote = &planned.target->cache;
  const Result<uint64_t> bytes = TotalBytes(planned.op);
  if (!bytes.ok()) {
    return bytes.status();
  }
  planned.bytes = bytes.value();
  return planned;
}

Status Link::MovePart(TransferDirection direction, const CacheRef &remote, const PlannedPart &planned,
                      Deadline deadline) {
  const bool pull = direction == TransferDirection::kPull;
  Status status = pull ? path_->Pull(planned.op, deadline) : path_->Push(planned.op, deadline);
  if (status.ok() && endpoint_->options().verify != Verify::kOff) {
    status = VerifyPart(planned.op, deadline);
  }
  if (status.ok() && pull && MayConsume(remote)) {
    status = ConsumeKey(remote.key, planned.op, deadline);
  }
  if (status.ok()) {
    (pull ? bytes_pulled_ : bytes_pushed_).fetch_add(planned.bytes, std::memory_order_relaxed);
  }
  return status;
}

Status Link::VerifyPart(const TransferOp &op, Deadline deadline) {
  if (RunsOverlap(op.runs, Side::kLocal) || RunsOverlap(op.runs, Side::kRemote)) {
    return Status::Ok();  // the last write won: which block shows what is not the question any more
  }
  for (const DigestPair &pair : DigestPairs(op)) {
    const Result<std::vector<uint32_t>> theirs = AskDigests(pair.remote, deadline);
    const Result<std::vector<uint32_t>> ours = DigestsOf(*op.local, pair.local, deadline);
    if (!theirs.ok() || !ours.ok()) {
      return theirs.ok() ? ours.status() : theirs.status();
    }
    if (theirs.value().size() != ours.value().size()) {
      return Status(LLM_FAILED, "the peer answered for other blocks");
    }
    blocks_verified_.fetch_add(ours.value().size(), std::memory_order_relaxed);
    const auto [mine, other] = std::mismatch(ours.value().begin(), ours.value().end(), theirs.value().begin());
    if (mine != ours.value().end()) {
      const auto at = static_cast<size_t>(mine - ours.value().begin());
      blocks_wrong_.fetch_add(1, std::memory_order_relaxed);
      const Status wrong(LLM_KV_CACHE_NOT_EXIST,
                         "the bytes that arrived are not the owner's, from offset " +
                             std::to_string(pair.remote.ranges[at].offset) + " of cache " +
                             std::to_string(pair.remote.cache_id) +
                             ": they changed while they were read, or were damaged on their way");
      Log(LogLevel::kError, Name() + ": " + wrong.text());
      if (endpoint_->options().verify == Verify::kFail) {
        return wrong;
      }
    }
  }
  return Status::Ok();
}

Result<std::vector<uint32_t>> Link::AskDigests(const DigestRequest &request, Deadline deadline) {
  DigestRequest asked = request;
  asked.remaining_ms = deadline.WireMillis();
  const Result<Frame> frame = session_->Call(MessageType::kDigest, Encode(asked), MessageType::kDigests, deadline);
  if (!frame.ok()) {
    return frame.status();
  }
  Result<Digests> digests = Decode<Digests>(frame.value().body);
  if (!digests.ok() || !digests.value().status.ok()) {
    return digests.ok() ? digests.value().status : digests.status();
  }
  return std::move(digests.value().values);
}

Result<std::shared_ptr<const RemoteTarget>> Link::DescribeRemote(const CacheRef &ref, Deadline deadline) {
  const bool by_id = ref.by == CacheRef::By::kId;
  if (by_id) {
    if (const auto it = described_.find(ref.cache_id); it != described_.end()) {
      return it->second;
    }
  }
  const Result<Frame> frame =
      session_->Call(MessageType::kDescribe, Encode(DescribeRequest{ref}), MessageType::kCacheInfo, deadline);
  if (!frame.ok()) {
    return frame.status();
  }
  Result<CacheInfo> info = Decode<CacheInfo>(frame.value().body);
  if (!info.ok()) {
    return info.status();
  }
  if (!info.value().status.ok()) {
    return info.value().status;
  }
  const RemoteCache &cache = info.value().target.cache;
  const bool needs_addrs = outgoing_.kind == TransportKind::kCma;
  if ((by_id && cache.cache_id != ref.cache_id) ||
      (needs_addrs && cache.tensor_addrs.size() != cache.geometry.num_tensors)) {
    return Status(LLM_FAILED, "the peer answered for another cache");
  }
  auto target = std::make_shared<const RemoteTarget>(std::move(info.value().target));
  if (by_id && target->lasting) {
    // Bounded by what we ask for, which is bounded by what the peer has registered.
    described_[ref.cache_id] = target;
  }
  return target;
}

// Both ends are in the same mode; which of the keys that may be consumed are, the owner knows.
bool Link::MayConsume(const CacheRef &remote) const {
  return !endpoint_->options().remote_accessible && remote.by == CacheRef::By::kKey &&
         remote.key.kind == KeyKind::kRequest;
}

Status Link::ConsumeKey(const CacheKey &key, const TransferOp &op, Deadline deadline) {
  const ConsumeRequest request{key, op.remote->generation, op.remote_first_tensor, op.tensor_count};
  const Result<Frame> frame =
      session_->Call(MessageType::kConsume, Encode(request), MessageType::kConsumed, deadline);
  if (!frame.ok()) {
    return frame.status();
  }
  const Result<Consumed> consumed = Decode<Consumed>(frame.value().body);
  return consumed.ok() ? consumed.value().status : consumed.status();
}

Status Link::AskToRead(const TransferOp &op, Deadline deadline) {
  const RegisteredCache &source = op.local->cache();
  PushRequest request;
  request.cache_id = op.remote->cache_id;
  request.generation = op.remote->generation;
  request.first_tensor = op.remote_first_tensor;
  request.source = Described(source);
  request.source_first_tensor = op.local_first_tensor;
  request.tensor_count = op.tensor_count;
  // More runs than one request takes go in several, in their order.
  for (size_t begin = 0; begin < op.runs.size(); begin += kMaxPushRuns) {
    request.runs.clear();
    for (size_t i = begin; i < std::min(begin + kMaxPushRuns, op.runs.size()); ++i) {
      request.runs.push_back(Run{op.runs[i].local_offset, op.runs[i].remote_offset, op.runs[i].length});
    }
    request.remaining_ms = deadline.WireMillis();
    const Result<Frame> frame =
        session_->Call(MessageType::kPush, Encode(request), MessageType::kPushed, deadline);
    if (!frame.ok()) {
      return frame.status();
    }
    const Result<Pushed> pushed = Decode<Pushed>(frame.value().body);
    if (!pushed.ok() || !pushed.value().status.ok()) {
      return pushed.ok() ? pushed.value().status : pushed.status();
    }
  }
  return Status::Ok();
}

}  // namespace datadist
