// Which bytes a call moves: the worked examples of the API, every refusal, and random moves against a slow oracle.
#include "transfer/moves.h"

#include <gtest/gtest.h>

#include <random>
#include <string>

namespace datadist {
namespace {

using Bytes = std::vector<uint8_t>;

CacheGeometry Geometry(uint64_t rows, uint64_t stride, CacheLayout layout = CacheLayout::kMix) {
  CacheGeometry geometry;
  geometry.num_tensors = 1;
  geometry.layout = layout;
  geometry.batch_size = layout == CacheLayout::kBlocks ? 1 : rows;
  geometry.num_blocks = layout == CacheLayout::kContiguous ? 0 : rows;
  geometry.stride = stride;
  geometry.tensor_bytes = rows * stride;
  return geometry;
}

void ExpectInvalid(const Status &status, const std::string &text) {
  EXPECT_EQ(status.code(), llm_datadist::LLM_PARAM_INVALID);
  EXPECT_NE(status.text().find(text), std::string::npos) << status.text();
}

void ExpectRuns(const Result<std::vector<ByteRun>> &runs, const std::vector<ByteRun> &expected) {
  ASSERT_TRUE(runs.ok()) << runs.status().text();
  ASSERT_EQ(runs.value().size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_EQ(runs.value()[i].src_offset, expected[i].src_offset) << i;
    EXPECT_EQ(runs.value()[i].dst_offset, expected[i].dst_offset) << i;
    EXPECT_EQ(runs.value()[i].length, expected[i].length) << i;
  }
}

const CacheGeometry kFour = Geometry(4, 64);  // of the worked examples: 4 rows or blocks of 64 bytes

Result<std::vector<ByteRun>> Runs(const Move &move) { return BuildRuns(move, kFour, kFour, LocalSide::kDestination, false); }

Result<std::vector<ByteRun>> BlockRuns(const std::vector<uint64_t> &src, const std::vector<uint64_t> &dst) {
  return Runs(BlockMove{src, dst});
}

TEST(Blocks, RunsGrowOnlyWhereBothListsAscend) {
  ExpectRuns(BlockRuns({0, 1, 3}, {2, 3, 0}), {{0, 128, 128}, {192, 0, 64}});
  ExpectRuns(BlockRuns({1, 0}, {1, 0}), {{64, 64, 64}, {0, 0, 64}});
  ExpectRuns(BlockRuns({0, 0}, {1, 2}), {{0, 64, 64}, {0, 128, 64}});
  ExpectRuns(BlockRuns({0, 1}, {1, 1}), {{0, 64, 64}, {64, 64, 64}});
  ExpectRuns(BlockRuns({0, 1, 2, 3}, {0, 1, 2, 3}), {{0, 0, 256}});
}

TEST(Blocks, StridesMustAgree) {
  const std::vector<uint64_t> one = {0};
  const BlockMove move{one, one};
  const CacheGeometry wide = Geometry(4, 128);
  for (const bool any_stride : {false, true}) {
    ExpectInvalid(BuildRuns(move, kFour, wide, LocalSide::kSource, any_stride).status(),
                  "64 bytes in the source cache, 128 in the destination");
  }
}

TEST(Rows, WholeRowsAndParts) {
  ExpectRuns(Runs(RowMove{2, 0, -1, 0, 0}), {{128, 0, 64}});
  ExpectRuns(Runs(RowMove{2, 1, 16, 0, 0}), {{128, 64, 16}});
  ExpectRuns(Runs(RowMove{0, 3, 16, 48, 8}), {{48, 200, 16}});
  ExpectRuns(Runs(RowMove{1, 1, -1, 0, 24}), {{64, 88, 40}});  // what the offset leaves of a local row
}

TEST(Rows, Refusals) {
  EXPECT_TRUE(CheckRowSize(-1).ok());
  EXPECT_TRUE(CheckRowSize(1).ok());
  ExpectInvalid(CheckRowSize(0), "size 0");
  ExpectInvalid(CheckRowSize(-2), "size -2");
  ExpectInvalid(CheckSource(RowMove{4, 0, -1, 0, 0}, kFour), "source batch_index 4: the cache has rows 0..3");
  ExpectInvalid(CheckDestination(RowMove{0, 9, -1, 0, 0}, kFour), "destination batch_index 9");
  ExpectInvalid(CheckDestination(RowMove{0, 0, 65, 0, 0}, kFour), "size 65");
  ExpectInvalid(CheckDestination(RowMove{0, 0, 1, 0, 64}, kFour), "destination offset 64");
  ExpectInvalid(CheckSource(RowMove{0, 0, 17, 48, 0}, kFour), "size 17 at source offset 48");
  ExpectInvalid(CheckSource(RowMove{0, 0, INT64_MAX, UINT64_MAX, 0}, kFour), "source offset");
  const CacheGeometry blocks = Geometry(4, 64, CacheLayout::kBlocks);
  ExpectInvalid(CheckSource(RowMove{0, 0, -1, 0, 0}, blocks), "blocks cache");
}

TEST(Rows, StridesMustAgreeUnlessAnyWillDo) {
  const CacheGeometry wide = Geometry(2, 100);
  const RowMove row{1, 1, 20, 0, 0};
  ExpectInvalid(BuildRuns(row, wide, kFour, LocalSide::kDestination, false).status(), "row size differs");
  ExpectRuns(BuildRuns(row, wide, kFour, LocalSide::kDestination, true), {{100, 64, 20}});
  ExpectRuns(BuildRuns(RowMove{1, 1, -1, 0, 0}, wide, kFour, LocalSide::kDestination, true), {{100, 64, 64}});
  ExpectInvalid(BuildRuns(RowMove{1, 1, -1, 0, 0}, kFour, wide, LocalSide::kDestination, true).status(), "size 100 at source offset 0");
}

TEST(Pieces, OfARow) {
  const CacheGeometry source = Geometry(2, 100, CacheLayout::kContiguous);
  const CacheGeometry target = Geometry(8, 30, CacheLayout::kBlocks);
  const auto runs = [&](uint64_t row, const std::vector<uint64_t> &blocks) {
    return BuildRuns(PieceMove{row, 30, blocks}, source, target, LocalSide::kSource, false);
  };
  ExpectRuns(runs(0, {5, 0, 1, 3}), {{0, 150, 30}, {30, 0, 60}, {90, 90, 10}});
  ExpectRuns(runs(1, {7, 6}), {{100, 210, 30}, {130, 180, 30}});
  const auto check = [&](uint64_t bytes, const std::vector<uint64_t> &blocks) {
    return CheckSource(PieceMove{0, bytes, blocks}, source);
  };
  EXPECT_TRUE(check(30, {0, 1, 2, 3}).ok());
  ExpectInvalid(check(30, {0, 1, 2, 3, 4}), "is 4 pieces of 30 bytes");
  EXPECT_TRUE(check(100, {0}).ok());
  EXPECT_TRUE(check(200, {0}).ok());
  ExpectInvalid(check(0, {0}), "blocks of 0 bytes");
  ExpectInvalid(check(30, {}), "0 entries");
  ExpectInvalid(CheckSource(PieceMove{2, 30, {}}, source), "source batch_index 2");
  const std::vector<uint64_t> beyond = {8};
  ExpectInvalid(CheckDestination(PieceMove{0, 30, beyond}, target), "dst_blocks[0] = 8");
  const std::vector<uint64_t> wraps = {UINT64_MAX / 30 + 1};
  ExpectInvalid(CheckDestination(PieceMove{0, 30, wraps}, target), "dst_blocks[0]");
  ExpectInvalid(CheckDestination(PieceMove{0, 30, beyond}, source), "contiguous");
  const std::vector<uint64_t> last = {1};  // 50 bytes at 50: a tensor of 90 bytes ends within the piece
  ExpectInvalid(BuildRuns(PieceMove{0, 50, last}, source, Geometry(3, 30), LocalSide::kSource, false).status(), "ends outside");
}

TEST(Pieces, OfAPushAreShorterThanTheTensor) {
  const CacheGeometry source = Geometry(2, 100, CacheLayout::kContiguous);
  const std::vector<uint64_t> blocks = {0};
  const auto check = [&](uint64_t bytes) { return CheckPushedPieces(PieceMove{0, bytes, blocks}, source); };
  EXPECT_TRUE(check(199).ok());
  ExpectInvalid(check(0), "dst_block_memory_size 0");
  ExpectInvalid(check(200), "allowed is 1..199");
  EXPECT_TRUE(CheckPushedPieces(RowMove{}, source).ok());
}

TEST(Address, OffsetsCountFromIt) {
  ExpectRuns(BuildRunsToAddress(RowMove{2, 0, -1, 0, 0}, kFour), {{128, 0, 64}});
  const std::vector<uint64_t> from = {3, 0};
  const std::vector<uint64_t> to = {1, 7};
  ExpectRuns(BuildRunsToAddress(BlockMove{from, to}, kFour), {{192, 64, 64}, {0, 448, 64}});
  ExpectRuns(BuildRunsToAddress(PieceMove{1, 40, to}, kFour), {{64, 40, 40}, {104, 280, 24}});
  const std::vector<uint64_t> wraps = {UINT64_MAX / 64};
  ExpectInvalid(BuildRunsToAddress(BlockMove{wraps, wraps}, kFour).status(), "exceeds 64 bits");
}

// The obvious way: one block after the other.
Bytes CopySlowly(const Bytes &from, Bytes to, const std::vector<ByteRun> &runs) {
  for (const ByteRun &run : runs) {
    std::copy_n(from.begin() + static_cast<std::ptrdiff_t>(run.src_offset), run.length,
                to.begin() + static_cast<std::ptrdiff_t>(run.dst_offset));
  }
  return to;
}

TEST(Oracle, RandomBlockAndPieceMoves) {
  constexpr uint32_t kSeed = 20;
  std::mt19937 random(kSeed);
  const auto below = [&random](uint64_t limit) { return random() % limit; };
  for (int round = 0; round < 2000; ++round) {
    SCOPED_TRACE("seed " + std::to_string(kSeed) + " round " + std::to_string(round));
    const uint64_t stride = 1 + below(9);
    const CacheGeometry source = Geometry(1 + below(6), stride);
    const CacheGeometry target = Geometry(1 + below(6), stride);
    Bytes from(source.tensor_bytes);
    for (uint8_t &byte : from) {
      byte = static_cast<uint8_t>(random());
    }
    const Bytes blank(target.tensor_bytes, 0);
    std::vector<uint64_t> src(1 + below(6));
    std::vector<uint64_t> dst(src.size());
    Bytes expected = blank;
    for (size_t i = 0; i < src.size(); ++i) {
      src[i] = below(source.num_blocks);
      dst[i] = below(target.num_blocks);
      for (uint64_t byte = 0; byte < stride; ++byte) {
        expected[dst[i] * stride + byte] = from[src[i] * stride + byte];
      }
    }
    const auto runs = BuildRuns(BlockMove{src, dst}, source, target, LocalSide::kSource, false);
    ASSERT_TRUE(runs.ok());
    ASSERT_EQ(CopySlowly(from, blank, runs.value()), expected);

    const uint64_t piece = 1 + below(stride);
    const uint64_t row = below(source.batch_size);
    const PieceMove pieces{row, piece, dst};
    if (!CheckSource(pieces, source).ok() || !CheckDestination(pieces, target).ok()) {
      continue;
    }
    const auto piece_runs = BuildRuns(pieces, source, target, LocalSide::kSource, false);
    Bytes by_piece = blank;
    bool fits = true;
    for (size_t i = 0; i < dst.size(); ++i) {
      for (uint64_t byte = 0; byte < piece && i * piece + byte < stride; ++byte) {
        const uint64_t at = dst[i] * piece + byte;
        fits = fits && at < by_piece.size();
        if (fits) {
          by_piece[at] = from[row * stride + i * piece + byte];
        }
      }
    }
    ASSERT_EQ(piece_runs.ok(), fits);
    if (fits) {
      ASSERT_EQ(CopySlowly(from, blank, piece_runs.value()), by_piece);
    }
  }
}

}  // namespace
}  // namespace datadist
