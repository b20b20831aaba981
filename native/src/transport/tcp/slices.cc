#include "transport/tcp/slices.h"

#include <algorithm>

namespace datadist {
namespace {

// Bytes [begin, end) of every one of some tensors, as slices.
void AppendSlices(const TransferOp &op, uint32_t first_tensor, uint32_t tensor_count, uint64_t begin, uint64_t end,
                  std::vector<OpSlice> &slices) {
  uint64_t passed = 0;  // bytes of the runs before this one
  bool open = false;
  for (const Run &run : op.runs) {
    const uint64_t from = std::max(begin, passed);
    const uint64_t to = std::min(end, passed + run.length);
    if (from < to) {
      if (!open || slices.back().remote.size() == kMaxSpansPerRequest) {
        slices.push_back({first_tensor, tensor_count, 0, {}, {}});
        open = true;
      }
      OpSlice &slice = slices.back();
      slice.remote.push_back({run.remote_offset + (from - passed), to - from});
      slice.local.push_back({run.local_offset + (from - passed), to - from});
      slice.total_bytes += (to - from) * tensor_count;
    }
    passed += run.length;
  }
}

}  // namespace

PartRange PartOf(uint64_t bytes_per_tensor, uint32_t tensor_count, size_t part, size_t parts) {
  // Cuts between tensors save requests; with few tensors they would leave streams unevenly loaded.
  constexpr size_t kEvenEnough = 4;
  if (tensor_count >= parts * kEvenEnough) {
    return {bytes_per_tensor * (tensor_count * part / parts), bytes_per_tensor * (tensor_count * (part + 1) / parts)};
  }
  const uint64_t total = bytes_per_tensor * tensor_count;
  const uint64_t share = total / parts;
  return {share * part, part + 1 == parts ? total : share * (part + 1)};
}

std::vector<OpSlice> SliceOp(const TransferOp &op, PartRange range, bool in_order) {
  std::vector<OpSlice> slices;
  uint64_t per_tensor = 0;
  for (const Run &run : op.runs) {
    per_tensor += run.length;
  }
  while (range.begin < range.end) {
    const auto tensor = static_cast<uint32_t>(range.begin / per_tensor);
    const uint64_t begin = range.begin % per_tensor;
    const uint64_t left = range.end - range.begin;
    if (begin == 0 && left >= per_tensor) {
      // Several slices of several tensors would go through the tensors once for each slice.
      const bool one_by_one = in_order && op.runs.size() > kMaxSpansPerRequest;
      const auto whole = one_by_one ? 1U : static_cast<uint32_t>(left / per_tensor);
      AppendSlices(op, tensor, whole, 0, per_tensor, slices);
      range.begin += whole * per_tensor;
    } else {
      const uint64_t end = std::min(begin + left, per_tensor);
      AppendSlices(op, tensor, 1, begin, end, slices);
      range.begin += end - begin;
    }
  }
  return slices;
}

}  // namespace datadist
