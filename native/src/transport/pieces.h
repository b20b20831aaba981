// What every transport does with an op before bytes move: check it, order it, cut it into parts.
//
// The bytes of an op form one sequence, tensor after tensor and run after run; a part is a range [begin, end) of it,
// and a PieceCursor walks the contiguous pieces of a part.
#ifndef DATADIST_TRANSPORT_PIECES_H_
#define DATADIST_TRANSPORT_PIECES_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "base/status.h"
#include "base/worker_pool.h"
#include "transport/transport.h"

namespace datadist {

// Below this, waking a second thread (12-15 us) costs more than it saves.
constexpr uint64_t kSplitBytes = 2ULL << 20;

enum class Side { kRemote, kLocal };

// Tensors and runs of one side inside `geometry`; runs not empty. LLM_PARAM_INVALID, naming the range.
Status CheckSide(const TransferOp &op, Side side, const CacheGeometry &geometry);
// Both sides, the remote one as far as the owner told us of it, and the total size.
Result<uint64_t> CheckOp(const TransferOp &op);

// Whether two runs touch the same byte of that side.
bool RunsOverlap(const std::vector<Run> &runs, Side side);
// Whether the order in which an op writes matters: some byte of `target`, the side that is written, may be written twice.
bool OrderMatters(const TransferOp &op, Side side, const CacheGeometry &target);

// How many parts to move `total` bytes in: 1 when the order of the runs matters or the gain is too small.
size_t PartCount(uint64_t total, size_t width, bool in_order);
// Runs move(begin, end) for each of `parts` equal parts of [0, total) on the pool and returns the first failure.
Status MoveParts(WorkerPool &pool, size_t parts, uint64_t total,
                 const std::function<Status(uint64_t begin, uint64_t end)> &move);

struct Piece {
  uint32_t tensor = 0;  // counted from the op's first
  uint64_t remote_offset = 0;
  uint64_t local_offset = 0;
  uint64_t length = 0;
};

class PieceCursor {
 public:
  // `runs` outlives the cursor, sums to `bytes_per_tensor`, and end <= bytes_per_tensor * tensors.
  PieceCursor(const std::vector<Run> &runs, uint64_t bytes_per_tensor, uint64_t begin, uint64_t end);

  bool AtEnd() const { return left_ == 0; }
  // The next piece, at most `max_length` long; not at the end.
  Piece Next(uint64_t max_length);

 private:
  const std::vector<Run> &runs_;
  uint64_t left_;
  uint32_t tensor_ = 0;
  size_t run_ = 0;
  uint64_t offset_ = 0;  // inside runs_[run_]
};

}  // namespace datadist

#endif  // DATADIST_TRANSPORT_PIECES_H_
