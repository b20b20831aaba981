// An op as requests: which bytes each stream moves, and in which requests.
#ifndef DATADIST_TRANSPORT_TCP_SLICES_H_
#define DATADIST_TRANSPORT_TCP_SLICES_H_

#include <cstdint>
#include <vector>

#include "transport/tcp/wire.h"
#include "transport/transport.h"

namespace datadist {

// A part of an op's byte sequence (pieces.h).
struct PartRange {
  uint64_t begin = 0;
  uint64_t end = 0;
};
PartRange PartOf(uint64_t bytes_per_tensor, uint32_t tensor_count, size_t part, size_t parts);

// What one request moves: equal spans of the tensors [first_tensor, +tensor_count), counted from the op's first.
struct OpSlice {
  uint32_t first_tensor = 0;
  uint32_t tensor_count = 0;
  uint64_t total_bytes = 0;
  std::vector<Span> remote;
  std::vector<Span> local;  // paired with `remote`
};

// In an order that keeps the runs of each tensor in list order and, `in_order`, all of a tensor before the next. A range that starts and ends between tensors takes one
// slice, unless it has more than kMaxSpansPerRequest runs.
std::vector<OpSlice> SliceOp(const TransferOp &op, PartRange range, bool in_order);

}  // namespace datadist

#endif  // DATADIST_TRANSPORT_TCP_SLICES_H_
