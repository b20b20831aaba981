// The initiator's side of a link: what we ask of the peer's memory. On the callers' threads, one transfer at a time.
#include <algorithm>
#include <utility>

#include "base/log.h"
#include "link/link.h"
#include "memory/digests.h"
#include "transport/pieces.h"

namespace datadist {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_KV_CACHE_NOT_EXIST;
using llm_datadist::LLM_NOT_YET_LINK;
using llm_datadist::LLM_TIMEOUT;

template <typename Answer, typename Request>
Result<Answer> Link::Ask(MessageType type, const Request &request, MessageType answer, Deadline deadline) {
  const Result<Frame> frame = session_->Call(type, Encode(request), answer, deadline);
  if (!frame.ok()) {
    return frame.status();
  }
  Result<Answer> decoded = Decode<Answer>(frame.value().body);
  return decoded.ok() && !decoded.value().status.ok() ? decoded.value().status : std::move(decoded);
}

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
  const std::vector<Run> blocks = BlocksOf(op.runs, op.remote->geometry.stride);
  for (size_t begin = 0; begin < blocks.size(); begin += kMaxDigestRanges) {
    DigestRequest request{op.remote->cache_id, op.remote->generation, op.remote_first_tensor, op.tensor_count, 0, {}};
    std::vector<Span> local;
    for (size_t i = begin; i < std::min(begin + kMaxDigestRanges, blocks.size()); ++i) {
      request.ranges.push_back({blocks[i].remote_offset, blocks[i].length});
      local.push_back({blocks[i].local_offset, blocks[i].length});
    }
    request.remaining_ms = deadline.WireMillis();
    const Result<Digests> theirs = Ask<Digests>(MessageType::kDigest, request, MessageType::kDigests, deadline);
    const auto ours = DigestsOf(*op.local, {op.local_first_tensor, op.tensor_count}, local, deadline);
    if (!theirs.ok() || !ours.ok()) {
      return theirs.ok() ? ours.status() : theirs.status();
    }
    if (Status same = CompareDigests(request, ours.value(), theirs.value().values); !same.ok()) {
      return same;
    }
  }
  return Status::Ok();
}

Status Link::CompareDigests(const DigestRequest &asked, const std::vector<uint32_t> &ours,
                            const std::vector<uint32_t> &theirs) {
  if (theirs.size() != ours.size()) {
    return Status(LLM_FAILED, "the peer answered for other blocks");
  }
  blocks_verified_.fetch_add(ours.size(), std::memory_order_relaxed);
  const auto [mine, other] = std::mismatch(ours.begin(), ours.end(), theirs.begin());
  if (mine == ours.end()) {
    return Status::Ok();
  }
  blocks_wrong_.fetch_add(1, std::memory_order_relaxed);
  const Status wrong(LLM_KV_CACHE_NOT_EXIST,
                     "the bytes that arrived are not the owner's, from offset " +
                         std::to_string(asked.ranges[static_cast<size_t>(mine - ours.begin())].offset) + " of cache " +
                         std::to_string(asked.cache_id) +
                         ": they changed while they were read, or were damaged on their way");
  Log(LogLevel::kError, Name() + ": " + wrong.text());
  return endpoint_->options().verify == Verify::kFail ? wrong : Status::Ok();
}

Result<std::shared_ptr<const RemoteTarget>> Link::DescribeRemote(const CacheRef &ref, Deadline deadline) {
  const bool by_id = ref.by == CacheRef::By::kId;
  if (by_id) {
    if (const auto it = described_.find(ref.cache_id); it != described_.end()) {
      return it->second;
    }
  }
  Result<CacheInfo> info =
      Ask<CacheInfo>(MessageType::kDescribe, DescribeRequest{ref}, MessageType::kCacheInfo, deadline);
  if (!info.ok()) {
    return info.status();
  }
  const RemoteCache &cache = info.value().target.cache;
  if (by_id && cache.cache_id != ref.cache_id) {
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
  const Result<Consumed> consumed = Ask<Consumed>(MessageType::kConsume, request, MessageType::kConsumed, deadline);
  return consumed.ok() ? Status::Ok() : consumed.status();
}

Status Link::AskToRead(const TransferOp &op, Deadline deadline) {
  PushRequest request;
  request.cache_id = op.remote->cache_id;
  request.generation = op.remote->generation;
  request.first_tensor = op.remote_first_tensor;
  request.source = outgoing_.transport->Describe(op.local->cache(), Disclosure::kForReading);
  request.source_first_tensor = op.local_first_tensor;
  request.tensor_count = op.tensor_count;
  // More runs than one request takes go in several, in their order.
  for (size_t begin = 0; begin < op.runs.size(); begin += kMaxPushRuns) {
    request.runs.clear();
    for (size_t i = begin; i < std::min(begin + kMaxPushRuns, op.runs.size()); ++i) {
      request.runs.push_back(Run{op.runs[i].local_offset, op.runs[i].remote_offset, op.runs[i].length});
    }
    request.remaining_ms = deadline.WireMillis();
    const Result<Pushed> pushed = Ask<Pushed>(MessageType::kPush, request, MessageType::kPushed, deadline);
    if (!pushed.ok()) {
      return pushed.status();
    }
  }
  return Status::Ok();
}

}  // namespace datadist
