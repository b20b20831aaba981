#include "transport/pieces.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/checked.h"

namespace datadist {
namespace {

uint64_t OffsetOf(const Run &run, Side side) { return side == Side::kRemote ? run.remote_offset : run.local_offset; }

struct Extent {
  uint64_t begin;
  uint64_t length;
};

bool ExtentsOverlap(std::vector<Extent> &extents) {
  const auto before = [](const Extent &a, const Extent &b) { return a.begin < b.begin; };
  if (!std::is_sorted(extents.begin(), extents.end(), before)) {
    std::sort(extents.begin(), extents.end(), before);
  }
  for (size_t i = 1; i < extents.size(); ++i) {
    if (extents[i].begin - extents[i - 1].begin < extents[i - 1].length) {
      return true;
    }
  }
  return false;
}

}  // namespace

Status CheckSide(const TransferOp &op, Side side, const CacheGeometry &geometry) {
  const std::string name = side == Side::kRemote ? "remote" : "local";
  const uint32_t first = side == Side::kRemote ? op.remote_first_tensor : op.local_first_tensor;
  if (op.runs.empty() || op.tensor_count == 0) {
    return Invalid("the transfer names no bytes");
  }
  if (!RangeFits(first, op.tensor_count, geometry.num_tensors)) {
    return Invalid(name + " tensors " + std::to_string(first) + ", count " + std::to_string(op.tensor_count) +
                   ": the cache has " + std::to_string(geometry.num_tensors));
  }
  for (const Run &run : op.runs) {
    if (run.length == 0 || !RangeFits(OffsetOf(run, side), run.length, geometry.tensor_bytes)) {
      return Invalid(name + " bytes at " + std::to_string(OffsetOf(run, side)) + ", length " +
                     std::to_string(run.length) + ": a tensor of the cache has " +
                     std::to_string(geometry.tensor_bytes) + " bytes");
    }
  }
  return Status::Ok();
}

Result<uint64_t> CheckOp(const TransferOp &op) {
  if (Status status = CheckSide(op, Side::kRemote, op.remote->geometry); !status.ok()) {
    return status;
  }
  if (Status status = CheckSide(op, Side::kLocal, op.local->cache().geometry()); !status.ok()) {
    return status;
  }
  return TotalBytes(op);
}

bool RunsOverlap(const std::vector<Run> &runs, Side side) {
  if (runs.size() < 2) {
    return false;
  }
  std::vector<Extent> extents;
  extents.reserve(runs.size());
  for (const Run &run : runs) {
    extents.push_back({OffsetOf(run, side), run.length});
  }
  return ExtentsOverlap(extents);
}

bool OrderMatters(const TransferOp &op, Side side, const CacheGeometry &target) {
  return (op.tensor_count > 1 && target.tensors_overlap) || RunsOverlap(op.runs, side);
}

size_t PartCount(uint64_t total, size_t width, bool in_order) {
  return in_order || total < kSplitBytes ? 1 : std::max<size_t>(width, 1);
}

Status MoveParts(WorkerPool &pool, size_t parts, uint64_t total,
                 const std::function<Status(uint64_t begin, uint64_t end)> &move) {
  if (parts == 1) {
    return move(0, total);
  }
  // Page-sized steps keep a page from being touched by two parts; the last part takes the remainder.
  constexpr uint64_t kPage = 4096;
  const uint64_t share = total / parts / kPage * kPage;
  std::vector<Status> results(parts);
  pool.Run(parts, [&](size_t part) {
    const uint64_t begin = share * part;
    results[part] = move(begin, part + 1 == parts ? total : begin + share);
  });
  for (Status &result : results) {
    if (!result.ok()) {
      return std::move(result);
    }
  }
  return Status::Ok();
}

PieceCursor::PieceCursor(const std::vector<Run> &runs, uint64_t bytes_per_tensor, uint64_t begin, uint64_t end)
    : runs_(runs), left_(end - begin), tensor_(static_cast<uint32_t>(begin / bytes_per_tensor)) {
  offset_ = begin % bytes_per_tensor;
  while (offset_ >= runs_[run_].length) {
    offset_ -= runs_[run_].length;
    ++run_;
  }
}

Piece PieceCursor::Next(uint64_t max_length) {
  const Run &run = runs_[run_];
  const uint64_t length = std::min({run.length - offset_, left_, max_length});
  const Piece piece{tensor_, run.remote_offset + offset_, run.local_offset + offset_, length};
  left_ -= length;
  offset_ += length;
  if (offset_ == run.length) {
    offset_ = 0;
    if (++run_ == runs_.size()) {
      run_ = 0;
      ++tensor_;
    }
  }
  return piece;
}

}  // namespace datadist
