#include "transport/cma/cma_data_path.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <utility>

#include "base/fence.h"
#include "transport/cma/addresses.h"
#include "transport/cma/process_memory.h"
#include "transport/pieces.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;

// An op turned for execution. `runs` are those of the op or, where their order does not matter, `sorted`.
struct Job {
  const TransferOp &op;
  Deadline deadline;
  uint64_t total;
  bool in_order;
  std::vector<Run> sorted;

  const std::vector<Run> &runs() const { return sorted.empty() ? op.runs : sorted; }
};

// Remote neighbours next to each other merge into fewer pinned ranges.
std::vector<Run> SortedByRemote(const std::vector<Run> &runs) {
  const auto before = [](const Run &a, const Run &b) { return a.remote_offset < b.remote_offset; };
  if (std::is_sorted(runs.begin(), runs.end(), before)) {
    return {};
  }
  std::vector<Run> sorted = runs;
  std::sort(sorted.begin(), sorted.end(), before);
  return sorted;
}

class CmaDataPath final : public DataPath {
 public:
  CmaDataPath(std::shared_ptr<const PeerProcess> process, PeerCalls *calls, std::shared_ptr<WorkerPool> pool)
      : process_(std::move(process)), calls_(calls), pool_(std::move(pool)) {}

  Status Pull(const TransferOp &op, Deadline deadline) override;
  Status Push(const TransferOp &op, Deadline deadline) override;
  void Close() override { closed_.store(true); }

 private:
  Result<Job> Prepare(const TransferOp &op, Deadline deadline) const;
  Status Execute(const Job &job) const;
  Status MovePart(const Job &job, uint64_t begin, uint64_t end, uint64_t *generation) const;
  void Fill(IovecBatch &batch, PieceCursor &pieces, const TransferOp &op) const;
  Status Judge(uint64_t generation, const TransferOp &op) const;
  Status Verify(const TransferOp &op) const;

  const std::shared_ptr<const PeerProcess> process_;
  PeerCalls *const calls_;
  const std::shared_ptr<WorkerPool> pool_;
  std::atomic<bool> closed_{false};
};

Result<Job> CmaDataPath::Prepare(const TransferOp &op, Deadline deadline) const {
  const RemoteCache &remote = *op.remote;
  const Result<uint64_t> total = CheckOp(op);
  if (!total.ok()) {
    return total.status();
  }
  if (remote.blob.empty()) {
    return Status(llm_datadist::LLM_PARAM_INVALID,
                  "peers may not read cache " + std::to_string(remote.cache_id) + " (option " +
                      llm_datadist::OPTION_PEER_ACCESS + ", or its rights): its owner did not tell where it lies");
  }
  if (!Addresses::AreWhole(remote)) {
    return Status(LLM_FAILED, "the peer did not tell the addresses of cache " + std::to_string(remote.cache_id));
  }
  Job job{op, deadline, total.value(), false, {}};
  job.in_order = OrderMatters(op, Side::kLocal, op.local->cache().geometry());
  if (!job.in_order) {
    job.sorted = SortedByRemote(op.runs);
  }
  return job;
}

Status CmaDataPath::Pull(const TransferOp &op, Deadline deadline) {
  const Result<Job> job = Prepare(op, deadline);
  return job.ok() ? Execute(job.value()) : job.status();
}

Status CmaDataPath::Push(const TransferOp &op, Deadline deadline) {
  if (const Result<uint64_t> total = CheckOp(op); !total.ok()) {
    return total.status();
  }
  if (closed_.load()) {
    return Status(LLM_FAILED, "the link was closed");
  }
  if (deadline.Expired()) {
    return Status(llm_datadist::LLM_TIMEOUT, "deadline passed before the push");
  }
  return calls_->AskToRead(op, deadline);
}

Status CmaDataPath::Execute(const Job &job) const {
  const size_t parts = PartCount(job.total, pool_->width(), job.in_order);
  uint64_t generation = 0;
  // The last call of a pull that is one part brings the generation along, behind its bytes: a small pull is one call.
  const bool along = parts == 1;
  Status moved = MoveParts(*pool_, parts, job.total, [&](uint64_t begin, uint64_t end) {
    return MovePart(job, begin, end, along ? &generation : nullptr);
  });
  if (moved.code() == llm_datadist::LLM_TIMEOUT) {
    return moved;
  }
  // The generation read after the bytes proves them: none comes back to another cache. Failed moves are looked at too,
  // because memory that vanished with its cache is a missing cache, not a broken link.
  if (moved.ok() && along) {
    return Judge(generation, job.op);
  }
  FullFence();
  Status verified = Verify(job.op);
  return verified.ok() ? moved : verified;
}

Status CmaDataPath::MovePart(const Job &job, uint64_t begin, uint64_t end, uint64_t *generation) const {
  PieceCursor pieces(job.runs(), job.total / job.op.tensor_count, begin, end);
  IovecBatch batch;
  while (!pieces.AtEnd()) {
    if (closed_.load()) {
      return Status(LLM_FAILED, "the link was closed");
    }
    if (job.deadline.Expired()) {
      return Status(llm_datadist::LLM_TIMEOUT, "deadline passed while copying");
    }
    Fill(batch, pieces, job.op);
    if (generation != nullptr && pieces.AtEnd()) {
      // The kernel fills a call's buffers in their order (process_vm_readv(2)): it is read after the bytes.
      batch.Add(Addresses(*job.op.remote).stamp(), generation, sizeof(*generation));
    }
    if (Status status = batch.Read(process_->pid()); !status.ok()) {
      return status;
    }
  }
  return Status::Ok();
}

// The addresses are sound: offsets were checked against the geometry that comes with them (remote) and against the pin
// (local).
void CmaDataPath::Fill(IovecBatch &batch, PieceCursor &pieces, const TransferOp &op) const {
  const Addresses remote(*op.remote);
  const uint64_t *const local = &op.local->cache().addrs()[op.local_first_tensor];
  while (!pieces.AtEnd() && !batch.Full()) {
    const Piece piece = pieces.Next(batch.RoomBytes());
    batch.Add(remote.tensor(op.remote_first_tensor + piece.tensor) + piece.remote_offset,
              reinterpret_cast<void *>(static_cast<uintptr_t>(local[piece.tensor] + piece.local_offset)), piece.length);
  }
}

Status CmaDataPath::Verify(const TransferOp &op) const {
  uint64_t generation = 0;
  IovecBatch batch;
  batch.Add(Addresses(*op.remote).stamp(), &generation, sizeof(generation));
  Status status = batch.Read(process_->pid());
  return status.ok() ? Judge(generation, op) : status;
}

Status CmaDataPath::Judge(uint64_t generation, const TransferOp &op) const {
  if (!process_->Alive()) {
    return Status(LLM_FAILED, process_->Name() + " is gone");
  }
  if (generation != op.remote->generation) {
    return Status(llm_datadist::LLM_KV_CACHE_NOT_EXIST,
                  "remote cache " + std::to_string(op.remote->cache_id) + " was unregistered");
  }
  return Status::Ok();
}

}  // namespace

std::unique_ptr<DataPath> MakeCmaDataPath(std::shared_ptr<const PeerProcess> process, PeerCalls *calls,
                                          std::shared_ptr<WorkerPool> pool) {
  return std::make_unique<CmaDataPath>(std::move(process), calls, std::move(pool));
}

}  // namespace datadist
