#include "transfer/moves.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/checked.h"
#include "transfer/plan.h"

namespace datadist {
namespace {

// Row `row` of a cache that has rows, and `size` bytes (-1: as yet unknown) at `offset` of it.
Status CheckRow(const char *side, uint64_t row, uint64_t offset, int64_t size, const CacheGeometry &geometry) {
  const std::string name = side;
  if (geometry.layout == CacheLayout::kBlocks) {
    return Invalid("the " + name + " cache is a blocks cache, it has no batch rows");
  }
  if (row >= geometry.batch_size) {
    return Invalid(name + " batch_index " + std::to_string(row) + ": the cache has rows 0.." +
                   std::to_string(geometry.batch_size - 1));
  }
  if (offset >= geometry.stride) {
    return Invalid(name + " offset " + std::to_string(offset) + ": a row has " + std::to_string(geometry.stride) +
                   " bytes");
  }
  if (size > 0 && !RangeFits(offset, static_cast<uint64_t>(size), geometry.stride)) {
    return Invalid("size " + std::to_string(size) + " at " + name + " offset " + std::to_string(offset) +
                   ": a row has " + std::to_string(geometry.stride) + " bytes");
  }
  return Status::Ok();
}

uint64_t PieceCount(uint64_t row_bytes, uint64_t piece_bytes) {
  return row_bytes / piece_bytes + (row_bytes % piece_bytes != 0 ? 1 : 0);
}

Status CheckPieces(const PieceMove &move, const CacheGeometry &source) {
  if (Status status = CheckRow("source", move.src_row, 0, -1, source); !status.ok()) {
    return status;
  }
  if (move.piece_bytes == 0) {
    return Invalid("the pieces of a row are blocks of 0 bytes: allowed is above 0");
  }
  const uint64_t pieces = PieceCount(source.stride, move.piece_bytes);
  if (move.dst_blocks.empty() || move.dst_blocks.size() > pieces) {
    return Invalid("dst_blocks has " + std::to_string(move.dst_blocks.size()) + " entries: a source row of " +
                   std::to_string(source.stride) + " bytes is " + std::to_string(pieces) + " pieces of " +
                   std::to_string(move.piece_bytes) + " bytes");
  }
  return Status::Ok();
}

// Bytes of piece `index` of the row.
uint64_t PieceBytes(const PieceMove &move, size_t index, const CacheGeometry &source) {
  return std::min(move.piece_bytes, source.stride - index * move.piece_bytes);
}

Status CheckPieceTargets(const PieceMove &move, const CacheGeometry &destination) {
  if (Status status = CheckHasBlocks("dst_blocks", destination); !status.ok()) {
    return status;
  }
  for (size_t i = 0; i < move.dst_blocks.size(); ++i) {
    const auto end = CheckedMul(move.dst_blocks[i], move.piece_bytes);
    if (!end.has_value() || *end >= destination.tensor_bytes) {
      return Invalid("dst_blocks[" + std::to_string(i) + "] = " + std::to_string(move.dst_blocks[i]) + " of " +
                     std::to_string(move.piece_bytes) + " bytes each: a destination tensor has " +
                     std::to_string(destination.tensor_bytes) + " bytes");
    }
  }
  return Status::Ok();
}

void Append(std::vector<ByteRun> &runs, const ByteRun &next) {
  if (!runs.empty()) {
    ByteRun &last = runs.back();
    if (last.src_offset + last.length == next.src_offset && last.dst_offset + last.length == next.dst_offset) {
      last.length += next.length;
      return;
    }
  }
  runs.push_back(next);
}

std::vector<ByteRun> BlockRuns(const BlockMove &move, uint64_t stride) {
  std::vector<ByteRun> runs;
  for (size_t i = 0; i < move.src_blocks.size(); ++i) {
    Append(runs, {move.src_blocks[i] * stride, move.dst_blocks[i] * stride, stride});
  }
  return runs;
}

Result<std::vector<ByteRun>> PieceRuns(const PieceMove &move, const CacheGeometry &source, uint64_t dst_limit) {
  std::vector<ByteRun> runs;
  for (size_t i = 0; i < move.dst_blocks.size(); ++i) {
    const uint64_t length = PieceBytes(move, i, source);
    const auto target = CheckedMul(move.dst_blocks[i], move.piece_bytes);
    if (!target.has_value() || !RangeFits(*target, length, dst_limit)) {
      return Invalid("dst_blocks[" + std::to_string(i) + "] = " + std::to_string(move.dst_blocks[i]) + " of " +
                     std::to_string(move.piece_bytes) + " bytes each ends outside the destination");
    }
    Append(runs, {move.src_row * source.stride + i * move.piece_bytes, *target, length});
  }
  return runs;
}

Status CheckEqualStrides(const char *what, const CacheGeometry &source, const CacheGeometry &destination) {
  if (source.stride != destination.stride) {
    return Invalid(std::string(what) + " size differs: " + std::to_string(source.stride) +
                   " bytes in the source cache, " + std::to_string(destination.stride) + " in the destination cache");
  }
  return Status::Ok();
}

Result<std::vector<ByteRun>> RowRuns(const RowMove &move, const CacheGeometry &source,
                                     const CacheGeometry &destination, LocalSide local, bool any_stride) {
  if (Status status = CheckEqualStrides("row", source, destination); !any_stride && !status.ok()) {
    return status;
  }
  const uint64_t whole = local == LocalSide::kSource ? source.stride - move.src_offset
                                                     : destination.stride - move.dst_offset;
  const uint64_t length = move.size > 0 ? static_cast<uint64_t>(move.size) : whole;
  for (const Status &status :
       {CheckRow("source", move.src_row, move.src_offset, static_cast<int64_t>(length), source),
        CheckRow("destination", move.dst_row, move.dst_offset, static_cast<int64_t>(length), destination)}) {
    if (!status.ok()) {
      return status;
    }
  }
  return std::vector<ByteRun>{{move.src_row * source.stride + move.src_offset,
                               move.dst_row * destination.stride + move.dst_offset, length}};
}

// One overload per kind of move: what each check and run builder is for it.
template <typename... Functions>
struct Overloaded : Functions... {
  using Functions::operator()...;
};
template <typename... Functions>
Overloaded(Functions...) -> Overloaded<Functions...>;

}  // namespace

Status CheckRowSize(int64_t size) {
  if (size != -1 && size <= 0) {
    return Invalid("size " + std::to_string(size) + ": allowed is above 0, or -1 for a whole row");
  }
  return Status::Ok();
}

Status CheckPushedPieces(const Move &move, const CacheGeometry &source) {
  const auto *const pieces = std::get_if<PieceMove>(&move);
  if (pieces != nullptr && (pieces->piece_bytes == 0 || pieces->piece_bytes >= source.tensor_bytes)) {
    return Invalid("dst_block_memory_size " + std::to_string(pieces->piece_bytes) + ": allowed is 1.." +
                   std::to_string(source.tensor_bytes - 1) + ", below the size of a source tensor");
  }
  return Status::Ok();
}

Status CheckSource(const Move &move, const CacheGeometry &source) {
  return std::visit(
      Overloaded{[&](const RowMove &rows) {
                   return CheckRow("source", rows.src_row, rows.src_offset, rows.size, source);
                 },
                 [&](const BlockMove &blocks) { return CheckBlockIndices("src_blocks", blocks.src_blocks, source); },
                 [&](const PieceMove &pieces) { return CheckPieces(pieces, source); }},
      move);
}

Status CheckDestination(const Move &move, const CacheGeometry &destination) {
  return std::visit(
      Overloaded{
          [&](const RowMove &rows) {
            return CheckRow("destination", rows.dst_row, rows.dst_offset, rows.size, destination);
          },
          [&](const BlockMove &blocks) { return CheckBlockIndices("dst_blocks", blocks.dst_blocks, destination); },
          [&](const PieceMove &pieces) { return CheckPieceTargets(pieces, destination); }},
      move);
}

Result<std::vector<ByteRun>> BuildRuns(const Move &move, const CacheGeometry &source, const CacheGeometry &destination,
                                       LocalSide local, bool any_stride) {
  using Runs = Result<std::vector<ByteRun>>;
  return std::visit(
      Overloaded{[&](const RowMove &rows) { return RowRuns(rows, source, destination, local, any_stride); },
                 [&](const BlockMove &blocks) -> Runs {
                   if (Status status = CheckEqualStrides("block", source, destination); !status.ok()) {
                     return status;
                   }
                   return BlockRuns(blocks, source.stride);
                 },
                 [&](const PieceMove &pieces) { return PieceRuns(pieces, source, destination.tensor_bytes); }},
      move);
}

Result<std::vector<ByteRun>> BuildRunsToAddress(const Move &move, const CacheGeometry &source) {
  using Runs = Result<std::vector<ByteRun>>;
  return std::visit(
      Overloaded{[&](const RowMove &rows) -> Runs {
                   const uint64_t length = rows.size > 0 ? static_cast<uint64_t>(rows.size) : source.stride;
                   return std::vector<ByteRun>{{rows.src_row * source.stride, 0, length}};
                 },
                 [&](const BlockMove &blocks) -> Runs {
                   for (const uint64_t block : blocks.dst_blocks) {
                     const auto start = CheckedMul(block, source.stride);
                     if (!start.has_value() || !CheckedAdd(*start, source.stride).has_value()) {
                       return Invalid("dst_blocks: " + std::to_string(block) + " of " +
                                      std::to_string(source.stride) + " bytes each exceeds 64 bits");
                     }
                   }
                   return BlockRuns(blocks, source.stride);
                 },
                 [&](const PieceMove &pieces) { return PieceRuns(pieces, source, UINT64_MAX); }},
      move);
}

}  // namespace datadist
