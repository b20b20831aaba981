#include "transport/local/local_data_path.h"

#include <atomic>
#include <cstring>
#include <string>
#include <utility>

#include "transport/pieces.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;

// One copy between two looks at the deadline: some milliseconds.
constexpr uint64_t kLongestCopy = 16ULL << 20;

enum class Direction { kPull, kPush };

class LocalDataPath final : public DataPath {
 public:
  LocalDataPath(std::weak_ptr<RegionTable> remote, uint64_t self, std::shared_ptr<WorkerPool> pool)
      : remote_(std::move(remote)), self_(self), pool_(std::move(pool)) {}

  Status Pull(const TransferOp &op, Deadline deadline) override { return Transfer(op, Direction::kPull, deadline); }
  Status Push(const TransferOp &op, Deadline deadline) override { return Transfer(op, Direction::kPush, deadline); }
  void Close() override { closed_.store(true); }

 private:
  Result<CachePin> PinRemote(const TransferOp &op, Direction direction) const;
  Status Transfer(const TransferOp &op, Direction direction, Deadline deadline);
  Status Copy(const TransferOp &op, const CachePin &remote, Direction direction, PieceCursor pieces,
              Deadline deadline) const;

  const std::weak_ptr<RegionTable> remote_;
  const uint64_t self_;
  const std::shared_ptr<WorkerPool> pool_;
  std::atomic<bool> closed_{false};
};

// The pin of exactly the registration that the op means, checked against what is really registered.
Result<CachePin> LocalDataPath::PinRemote(const TransferOp &op, Direction direction) const {
  const std::shared_ptr<RegionTable> table = remote_.lock();
  if (table == nullptr) {
    return Status(LLM_FAILED, "the peer endpoint in this process is gone");
  }
  const PeerRequest request{self_, direction == Direction::kPull ? PeerUse::kRead : PeerUse::kWrite,
                            {op.remote_first_tensor, op.tensor_count}, {op.runs, &Run::remote_offset}};
  Result<CachePin> pin = table->PinForPeer(op.remote->cache_id, op.remote->generation, request);
  if (!pin.ok()) {
    return pin;
  }
  if (Status status = CheckSide(op, Side::kRemote, pin.value().cache().geometry()); !status.ok()) {
    return status;
  }
  return pin;
}

Status LocalDataPath::Transfer(const TransferOp &op, Direction direction, Deadline deadline) {
  const Result<uint64_t> total = CheckOp(op);
  if (!total.ok()) {
    return total.status();
  }
  const Result<CachePin> remote = PinRemote(op, direction);
  if (!remote.ok()) {
    return remote.status();
  }
  const bool pull = direction == Direction::kPull;
  const RegisteredCache &target = pull ? op.local->cache() : remote.value().cache();
  const bool in_order = OrderMatters(op, pull ? Side::kLocal : Side::kRemote, target.geometry());
  return MoveParts(*pool_, PartCount(total.value(), pool_->width(), in_order), total.value(),
                   [&](uint64_t begin, uint64_t end) {
                     return Copy(op, remote.value(), direction,
                                 PieceCursor(op.runs, total.value() / op.tensor_count, begin, end), deadline);
                   });
}

Status LocalDataPath::Copy(const TransferOp &op, const CachePin &remote, Direction direction, PieceCursor pieces,
                           Deadline deadline) const {
  uint64_t since_check = kLongestCopy;
  while (!pieces.AtEnd()) {
    if (since_check >= kLongestCopy) {
      since_check = 0;
      if (closed_.load()) {
        return Status(LLM_FAILED, "the link was closed");
      }
      if (deadline.Expired()) {
        return Status(llm_datadist::LLM_TIMEOUT, "deadline passed while copying");
      }
    }
    const Piece piece = pieces.Next(kLongestCopy);
    const auto far = remote.Resolve(op.remote_first_tensor + piece.tensor, piece.remote_offset, piece.length);
    const auto near = op.local->Resolve(op.local_first_tensor + piece.tensor, piece.local_offset, piece.length);
    if (!far.ok() || !near.ok()) {
      return far.ok() ? near.status() : far.status();
    }
    std::byte *const to = direction == Direction::kPull ? near.value() : far.value();
    const std::byte *const from = direction == Direction::kPull ? far.value() : near.value();
    std::memmove(to, from, piece.length);  // both caches may name the same memory
    since_check += piece.length;
  }
  return Status::Ok();
}

}  // namespace

std::unique_ptr<DataPath> MakeLocalDataPath(std::weak_ptr<RegionTable> remote, uint64_t self,
                                            std::shared_ptr<WorkerPool> pool) {
  return std::make_unique<LocalDataPath>(std::move(remote), self, std::move(pool));
}

}  // namespace datadist
