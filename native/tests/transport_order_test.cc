// The order of writes, for every transport: runs in list order, tensor after tensor, the last write of a byte stays.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <string>

#include "transport_support/transports.h"

namespace datadist::test {
namespace {

class TransportOrder : public EachTransport {};

TEST_P(TransportOrder, LastOfRepeatedDestinationsWinsInLargeTransfers) {
  const CacheShape shape{2, 512, 4096};
  const RemoteCache remote = owner_->AddCache(shape, 5);
  LocalCache local(shape, 6);
  TransferOp op{&remote, &local.pin(), 0, 0, 2, {}};
  for (uint64_t i = 0; i < shape.num_blocks; ++i) {  // descending sources into two alternating blocks
    op.runs.push_back({(shape.num_blocks - 1 - i) * shape.stride, (i % 2) * shape.stride, shape.stride});
  }
  ASSERT_TRUE(path_->Pull(op, Soon()).ok());
  std::vector<uint8_t> expected = PatternOf(shape, 6);
  const std::vector<uint8_t> source = PatternOf(shape, 5);
  for (uint64_t tensor = 0; tensor < 2; ++tensor) {
    const uint64_t base = tensor * shape.num_blocks * shape.stride;
    std::memcpy(&expected[base], &source[base + shape.stride], shape.stride);
    std::memcpy(&expected[base + shape.stride], &source[base], shape.stride);
  }
  ASSERT_EQ(local.Bytes(), expected);
}

// Tensor after tensor and run after run: the last write of a byte stays, whichever tensor it was meant for.
TEST_P(TransportOrder, WritesTensorsThatOverlapInOrder) {
  const CacheShape apart{5, 200, 4096};
  CacheShape overlapping = apart;
  overlapping.distance = 50 * apart.stride;
  const size_t tensor_bytes = apart.num_blocks * apart.stride;
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    const bool pull = seed % 2 == 0;
    SCOPED_TRACE("seed " + std::to_string(seed));
    const RemoteCache remote = owner_->AddCache(pull ? apart : overlapping, seed);
    LocalCache local(pull ? overlapping : apart, ~seed);
    std::mt19937_64 random(seed);
    std::vector<uint64_t> from(apart.num_blocks);
    std::iota(from.begin(), from.end(), 0);
    std::vector<uint64_t> to = from;
    std::shuffle(from.begin(), from.end(), random);
    std::shuffle(to.begin(), to.end(), random);
    const auto runs = pull ? BlockRuns(from, to, apart.stride) : BlockRuns(to, from, apart.stride);
    const TransferOp op{&remote, &local.pin(), 0, 0, apart.num_tensors, runs};
    const std::vector<uint8_t> source = pull ? owner_->Bytes(remote.cache_id) : local.Bytes();
    ASSERT_TRUE((pull ? path_->Pull(op, Soon()) : path_->Push(op, Soon())).ok());

    // Every byte of every tensor is written.
    std::vector<uint8_t> memory(tensor_bytes + (apart.num_tensors - 1) * overlapping.distance);
    for (size_t tensor = 0; tensor < apart.num_tensors; ++tensor) {
      for (size_t i = 0; i < from.size(); ++i) {
        std::memcpy(&memory[tensor * overlapping.distance + to[i] * apart.stride],
                    &source[tensor * tensor_bytes + from[i] * apart.stride], apart.stride);
      }
    }
    std::vector<uint8_t> expected;
    for (size_t tensor = 0; tensor < apart.num_tensors; ++tensor) {
      const auto start = memory.begin() + static_cast<std::ptrdiff_t>(tensor * overlapping.distance);
      expected.insert(expected.end(), start, start + static_cast<std::ptrdiff_t>(tensor_bytes));
    }
    ASSERT_EQ(pull ? local.Bytes() : owner_->Bytes(remote.cache_id), expected);
  }
}

INSTANTIATE_TEST_SUITE_P(All, TransportOrder, kAllTransports, NameOf);

}  // namespace
}  // namespace datadist::test

int main(int argc, char **argv) { return datadist::test::TestMain(argc, argv); }
