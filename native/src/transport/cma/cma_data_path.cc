#include "transport/cma/cma_data_path.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <utility>

#include "base/fence.h"
#include "transport/cma/process_memory.h"
#include "transport/pieces.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;

// What a peer shows of itself: our challenge for as long as the link lives, the generation for as long as the cache is
// registered.
struct Witness {
  Challenge challenge{};
  uint64_t generation = 0;
};

// An op turned for execution. `runs` are those of the op or, where their order does not matter, `sorted`.
struct Job {
  const TransferOp &op;
  VmDirection direction;
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
  CmaDataPath(CmaPeer peer, PeerCalls *calls, std::shared_ptr<WorkerPool> pool)
      : peer_(std::move(peer)), calls_(calls), pool_(std::move(pool)) {}

  TransportKind kind() const override { return TransportKind::kCma; }
  Status Pull(const TransferOp &op, Deadline deadline) override;
  Status Push(const TransferOp &op, Deadline deadline) override;
  void Close() override { closed_.store(true); }

 private:
  Result<Job> Prepare(const TransferOp &op, VmDirection direction, Deadline deadline) const;
  Status Execute(const Job &job) const;
  Status MovePart(const Job &job, uint64_t begin, uint64_t end, Witness *witness) const;
  void Fill(IovecBatch &batch, PieceCursor &pieces, const TransferOp &op) const;
  void AddWitness(IovecBatch &batch, const TransferOp &op, Witness &witness) const;
  Status Judge(const Witness &witness, const TransferOp &op) const;
  Status Verify(const TransferOp &op) const;

  const CmaPeer peer_;
  PeerCalls *const calls_;
  const std::shared_ptr<WorkerPool> pool_;
  std::atomic<bool> closed_{false};
};

Result<Job> CmaDataPath::Prepare(const TransferOp &op, VmDirection direction, Deadline deadline) const {
  const RemoteCache &remote = *op.remote;
  const Result<uint64_t> total = CheckOp(op);
  if (!total.ok()) {
    return total.status();
  }
  if (remote.stamp_addr == 0 || remote.tensor_addrs.size() != remote.geometry.num_tensors) {
    return Status(LLM_FAILED, "the peer did not tell the addresses of cache " + std::to_string(remote.cache_id));
  }
  const bool pull = direction == VmDirection::kRead;
  Job job{op, direction, deadline, total.value(), false, {}};
  job.in_order = pull ? OrderMatters(op, Side::kLocal, op.local->cache().geometry())
                      : OrderMatters(op, Side::kRemote, remote.geometry);
  if (!job.in_order) {
    job.sorted = SortedByRemote(op.runs);
  }
  return job;
}

Status CmaDataPath::Pull(const TransferOp &op, Deadline deadline) {
  const Result<Job> job = Prepare(op, VmDirection::kRead, deadline);
  return job.ok() ? Execute(job.value()) : job.status();
}

Status CmaDataPath::Push(const TransferOp &op, Deadline deadline) {
  const Result<Job> job = Prepare(op, VmDirection::kWrite, deadline);
  if (!job.ok()) {
    return job.status();
  }
  if (closed_.load()) {
    return Status(LLM_FAILED, "the link was closed");
  }
  const Result<uint64_t> grant = calls_->AcquireWrite(op, deadline);
  if (!grant.ok()) {
    return grant.status();
  }
  Status status = Execute(job.value());
  calls_->ReleaseWrite(grant.value());
  return status;
}

Status CmaDataPath::Execute(const Job &job) const {
  const size_t parts = PartCount(job.total, pool_->width(), job.in_order);
  Witness witness;
  // The last call of a pull that is one part brings the witness along, behind its bytes: a small pull is one call.
  const bool with_witness = parts == 1 && job.direction == VmDirection::kRead;
  Status moved = MoveParts(*pool_, parts, job.total, [&](uint64_t begin, uint64_t end) {
    return MovePart(job, begin, end, with_witness ? &witness : nullptr);
  });
  if (moved.code() == llm_datadist::LLM_TIMEOUT) {
    return moved;
  }
  // Slot and stamp read after the bytes prove them: a pid does not come back to a process, a generation not to a cache.
  // Failed moves are looked at too, because memory that vanished with its cache is a missing cache, not a broken link.
  if (moved.ok() && with_witness) {
    return Judge(witness, job.op);
  }
  FullFence();
  Status verified = Verify(job.op);
  return verified.ok() ? moved : verified;
}

// Bytes written into a wrong process cannot be taken back, so a look at who is there precedes each call of a push.
// Bytes read from one are thrown away by the look that follows them: a pull needs none before.
Status CmaDataPath::MovePart(const Job &job, uint64_t begin, uint64_t end, Witness *witness) const {
  PieceCursor pieces(job.runs(), job.total / job.op.tensor_count, begin, end);
  IovecBatch batch;
  while (!pieces.AtEnd()) {
    if (closed_.load()) {
      return Status(LLM_FAILED, "the link was closed");
    }
    if (job.deadline.Expired()) {
      return Status(llm_datadist::LLM_TIMEOUT, "deadline passed while copying");
    }
    if (job.direction == VmDirection::kWrite) {
      if (Status status = Verify(job.op); !status.ok()) {
        return status;
      }
    }
    Fill(batch, pieces, job.op);
    if (witness != nullptr && pieces.AtEnd()) {
      AddWitness(batch, job.op, *witness);
    }
    if (Status status = batch.Move(peer_.host.pid, job.direction); !status.ok()) {
      return status;
    }
  }
  return Status::Ok();
}

// The addresses are sound: offsets were checked against the geometry that comes with them (remote) and against the pin
// (local).
void CmaDataPath::Fill(IovecBatch &batch, PieceCursor &pieces, const TransferOp &op) const {
  const uint64_t *const remote = &op.remote->tensor_addrs[op.remote_first_tensor];
  const uint64_t *const local = &op.local->cache().addrs()[op.local_first_tensor];
  while (!pieces.AtEnd() && !batch.Full()) {
    const Piece piece = pieces.Next(batch.RoomBytes());
    batch.Add(remote[piece.tensor] + piece.remote_offset,
              reinterpret_cast<void *>(static_cast<uintptr_t>(local[piece.tensor] + piece.local_offset)), piece.length);
  }
}

// Slot and stamp in one call, so that they are of the same process. The kernel fills a call's buffers in their order
// (process_vm_readv(2)), so behind bytes of the same call they are read after them.
void CmaDataPath::AddWitness(IovecBatch &batch, const TransferOp &op, Witness &witness) const {
  batch.Add(peer_.slot_addr, witness.challenge.data(), witness.challenge.size());
  batch.Add(op.remote->stamp_addr, &witness.generation, sizeof(witness.generation));
}

Status CmaDataPath::Verify(const TransferOp &op) const {
  Witness witness;
  IovecBatch batch;
  AddWitness(batch, op, witness);
  Status status = batch.Move(peer_.host.pid, VmDirection::kRead);
  return status.ok() ? Judge(witness, op) : status;
}

Status CmaDataPath::Judge(const Witness &witness, const TransferOp &op) const {
  if (witness.challenge != peer_.challenge) {
    return Status(LLM_FAILED, "process " + std::to_string(peer_.host.pid) +
                                  " no longer holds the challenge of this link: it dropped the link, or is another");
  }
  if (witness.generation != op.remote->generation) {
    return Status(llm_datadist::LLM_KV_CACHE_NOT_EXIST,
                  "remote cache " + std::to_string(op.remote->cache_id) + " was unregistered");
  }
  return Status::Ok();
}

}  // namespace

std::unique_ptr<DataPath> MakeCmaDataPath(CmaPeer peer, PeerCalls *calls, std::shared_ptr<WorkerPool> pool) {
  return std::make_unique<CmaDataPath>(std::move(peer), calls, std::move(pool));
}

}  // namespace datadist
