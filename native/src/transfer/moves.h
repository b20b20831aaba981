// Which bytes of a pair of tensors a Pull or Push call moves: rows, blocks, or a row in pieces to blocks. Pure
// functions, no I/O; every failure is LLM_PARAM_INVALID and names field, value and range.
//
// `source` and `destination` are those of the call; which of the two is local depends on its direction.
#ifndef DATADIST_TRANSFER_MOVES_H_
#define DATADIST_TRANSFER_MOVES_H_

#include <cstdint>
#include <variant>
#include <vector>

#include "base/status.h"
#include "memory/region_table.h"

namespace datadist {

// `size` bytes of one row; -1: a whole row of the local cache, less its offset.
struct RowMove {
  uint64_t src_row = 0;
  uint64_t dst_row = 0;
  int64_t size = -1;
  uint64_t src_offset = 0;
  uint64_t dst_offset = 0;
};

// src_blocks[i] -> dst_blocks[i], in list order. The lists are the caller's and outlive the move.
struct BlockMove {
  const std::vector<uint64_t> &src_blocks;
  const std::vector<uint64_t> &dst_blocks;
};

// The k-th piece of a row, `piece_bytes` long (the last one ends with the row), to dst_blocks[k], which lies at that
// many times piece_bytes.
struct PieceMove {
  uint64_t src_row = 0;
  uint64_t piece_bytes = 0;
  const std::vector<uint64_t> &dst_blocks;
};

using Move = std::variant<RowMove, BlockMove, PieceMove>;

// One side alone.
Status CheckSource(const Move &move, const CacheGeometry &source);
Status CheckDestination(const Move &move, const CacheGeometry &destination);

// Of a push: the caller says how long the pieces are, and the documentation bounds that by the source tensor. A pull's
// pieces are as long as the blocks of its own cache, which may hold a whole row and more.
Status CheckPushedPieces(const Move &move, const CacheGeometry &source);

// A row move's size, judged before anything else: -1 or above 0.
Status CheckRowSize(int64_t size);

struct ByteRun {
  uint64_t src_offset = 0;
  uint64_t dst_offset = 0;
  uint64_t length = 0;
};

// What both sides must agree on, then the runs in list order. A run grows while source and destination both go on where
// it ends; nothing is sorted or dropped, so that where destinations repeat the last one wins. Each side was checked.
//
// `local` is the side whose rows say how long "a whole row" is. Rows and blocks must be equally long on both sides;
// not rows with `any_stride` (two-sided mode, local copies), which only have to hold what is moved.
enum class LocalSide : uint8_t { kSource, kDestination };
Result<std::vector<ByteRun>> BuildRuns(const Move &move, const CacheGeometry &source, const CacheGeometry &destination,
                                       LocalSide local, bool any_stride);

// The same with a bare address as the destination: offsets count from it, and `source` is local. The end of the last
// byte written is what must be free there.
Result<std::vector<ByteRun>> BuildRunsToAddress(const Move &move, const CacheGeometry &source);

}  // namespace datadist

#endif  // DATADIST_TRANSFER_MOVES_H_
