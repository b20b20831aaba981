// The contract of transport.h, for every transport, with the owner in this process and in another.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <thread>

#include "transport_support/transports.h"

namespace datadist::test {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_KV_CACHE_NOT_EXIST;
using llm_datadist::LLM_PARAM_INVALID;
using llm_datadist::LLM_TIMEOUT;
using std::chrono::milliseconds;

class TransportContract : public EachTransport {};

// Block lists of any order, with repeated sources and destinations.
std::vector<uint64_t> RandomBlocks(std::mt19937_64 &random, size_t count, uint64_t num_blocks) {
  std::vector<uint64_t> blocks(count);
  uint64_t next = 0;
  for (uint64_t &block : blocks) {
    next = random() % 3 != 0 ? (next + 1) % num_blocks : random() % num_blocks;  // runs and jumps
    block = next;
  }
  return blocks;
}

struct RandomCase {
  CacheShape remote_shape;
  CacheShape local_shape;
  TransferOp op;
  std::vector<uint64_t> remote_blocks;
  std::vector<uint64_t> local_blocks;

  explicit RandomCase(std::mt19937_64 &random) {
    const auto up_to = [&random](uint64_t most) { return 1 + random() % most; };
    const uint64_t stride = random() % 2 == 0 ? up_to(300) : 512 * up_to(16);
    remote_shape = {static_cast<uint32_t>(up_to(6)), up_to(40), stride};
    local_shape = {static_cast<uint32_t>(up_to(6)), up_to(40), stride};
    op.tensor_count = static_cast<uint32_t>(up_to(std::min(remote_shape.num_tensors, local_shape.num_tensors)));
    op.remote_first_tensor = static_cast<uint32_t>(random() % (remote_shape.num_tensors - op.tensor_count + 1));
    op.local_first_tensor = static_cast<uint32_t>(random() % (local_shape.num_tensors - op.tensor_count + 1));
    const size_t count = up_to(60);
    remote_blocks = RandomBlocks(random, count, remote_shape.num_blocks);
    local_blocks = RandomBlocks(random, count, local_shape.num_blocks);
    op.runs = BlockRuns(remote_blocks, local_blocks, stride);
  }

  // The slow oracle: one block after another, as the API words it.
  std::vector<uint8_t> Expected(bool pull, const std::vector<uint8_t> &source, std::vector<uint8_t> target) const {
    const CacheShape &from = pull ? remote_shape : local_shape;
    const CacheShape &to = pull ? local_shape : remote_shape;
    const uint32_t from_first = pull ? op.remote_first_tensor : op.local_first_tensor;
    const uint32_t to_first = pull ? op.local_first_tensor : op.remote_first_tensor;
    for (uint32_t tensor = 0; tensor < op.tensor_count; ++tensor) {
      for (size_t i = 0; i < remote_blocks.size(); ++i) {
        const uint64_t from_block = pull ? remote_blocks[i] : local_blocks[i];
        const uint64_t to_block = pull ? local_blocks[i] : remote_blocks[i];
        std::memcpy(&target[((to_first + tensor) * to.num_blocks + to_block) * to.stride],
                    &source[((from_first + tensor) * from.num_blocks + from_block) * from.stride], from.stride);
      }
    }
    return target;
  }
};

TEST_P(TransportContract, PullsRandomBlockListsByteExact) {
  for (uint64_t seed = 1; seed <= 150; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 random(seed);
    RandomCase test(random);
    const RemoteCache remote = owner_->AddCache(test.remote_shape, seed);
    LocalCache local(test.local_shape, ~seed);
    test.op.remote = &remote;
    test.op.local = &local.pin();
    const Status status = path_->Pull(test.op, Soon());
    ASSERT_TRUE(status.ok()) << status.text();
    ASSERT_EQ(local.Bytes(), test.Expected(true, PatternOf(test.remote_shape, seed),
                                           PatternOf(test.local_shape, ~seed)));
    ASSERT_TRUE(local.CanariesIntact());
  }
}

TEST_P(TransportContract, PushesRandomBlockListsByteExact) {
  for (uint64_t seed = 1; seed <= 150; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 random(seed);
    RandomCase test(random);
    const RemoteCache remote = owner_->AddCache(test.remote_shape, seed);
    LocalCache local(test.local_shape, ~seed);
    test.op.remote = &remote;
    test.op.local = &local.pin();
    const Status status = path_->Push(test.op, Soon());
    ASSERT_TRUE(status.ok()) << status.text();
    ASSERT_EQ(owner_->Bytes(remote.cache_id), test.Expected(false, PatternOf(test.local_shape, ~seed),
                                                            PatternOf(test.remote_shape, seed)));
    ASSERT_TRUE(owner_->CanariesIntact(remote.cache_id));
    ASSERT_EQ(local.Bytes(), PatternOf(test.local_shape, ~seed));
  }
}

// Big enough for several threads and streams; few and many tensors take different cuts.
TEST_P(TransportContract, MovesLargePermutationsByteExact) {
  for (const uint32_t tensors : {1U, 3U, 16U}) {
    SCOPED_TRACE("tensors " + std::to_string(tensors));
    const CacheShape shape{tensors, 600, 4096 + 16};
    const RemoteCache remote = owner_->AddCache(shape, tensors);
    LocalCache local(shape, 99);
    std::mt19937_64 random(tensors);
    std::vector<uint64_t> sources(shape.num_blocks);
    std::iota(sources.begin(), sources.end(), 0);
    std::vector<uint64_t> targets = sources;
    std::shuffle(sources.begin(), sources.end(), random);
    std::shuffle(targets.begin(), targets.end(), random);
    TransferOp op{&remote, &local.pin(), 0, 0, tensors, BlockRuns(sources, targets, shape.stride)};
    ASSERT_TRUE(path_->Pull(op, Soon()).ok());

    const std::vector<uint8_t> source = PatternOf(shape, tensors);
    std::vector<uint8_t> expected(source.size());
    for (uint32_t tensor = 0; tensor < tensors; ++tensor) {
      for (size_t i = 0; i < sources.size(); ++i) {
        std::memcpy(&expected[(tensor * shape.num_blocks + targets[i]) * shape.stride],
                    &source[(tensor * shape.num_blocks + sources[i]) * shape.stride], shape.stride);
      }
    }
    ASSERT_EQ(local.Bytes(), expected);

    local.Fill(PatternOf(shape, 7));
    ASSERT_TRUE(path_->Push(op, Soon()).ok());
    ASSERT_TRUE(path_->Pull(op, Soon()).ok());  // and back: the permutation undoes itself
    ASSERT_EQ(local.Bytes(), PatternOf(shape, 7));
  }
}

// ---- bounds ----

struct BadRange {
  const char *what;
  void (*spoil)(TransferOp &op);
};

constexpr uint64_t kHuge = ~uint64_t{0};
constexpr BadRange kBadRanges[] = {
    {"remote end", [](TransferOp &op) { op.runs[0].remote_offset += 1; }},
    {"remote start", [](TransferOp &op) { op.runs[0].remote_offset = 4 * 64; }},
    {"remote wrap", [](TransferOp &op) { op.runs[0].remote_offset = kHuge - 10; }},
    {"local end", [](TransferOp &op) { op.runs[0].local_offset += 1; }},
    {"local wrap", [](TransferOp &op) { op.runs[0].local_offset = kHuge; }},
    {"length", [](TransferOp &op) { op.runs[0].length = kHuge; }},
    {"no length", [](TransferOp &op) { op.runs[0].length = 0; }},
    {"remote tensor", [](TransferOp &op) { op.remote_first_tensor = 1; }},
    {"local tensor", [](TransferOp &op) { op.local_first_tensor = 1; }},
    {"remote tensor wrap", [](TransferOp &op) { op.remote_first_tensor = ~0U; }},
    {"tensor count", [](TransferOp &op) { op.tensor_count = 3; }},
    {"no tensors", [](TransferOp &op) { op.tensor_count = 0; }},
    {"no runs", [](TransferOp &op) { op.runs.clear(); }},
};

TEST_P(TransportContract, RefusesRangesOutside) {
  const CacheShape shape{2, 4, 64};
  const RemoteCache remote = owner_->AddCache(shape, 1);
  LocalCache local(shape, 2);
  for (const BadRange &bad : kBadRanges) {
    SCOPED_TRACE(bad.what);
    TransferOp op{&remote, &local.pin(), 0, 0, 2, {{0, 0, 4 * 64}}};
    bad.spoil(op);
    EXPECT_EQ(path_->Pull(op, Soon()).code(), LLM_PARAM_INVALID);
    EXPECT_EQ(path_->Push(op, Soon()).code(), LLM_PARAM_INVALID);
  }
  EXPECT_EQ(local.Bytes(), PatternOf(shape, 2));
  EXPECT_EQ(owner_->Bytes(remote.cache_id), PatternOf(shape, 1));
}

// An initiator that believes, or pretends, that the cache is larger than it is.
TEST_P(TransportContract, OwnerRefusesRangesOutsideWhateverTheInitiatorBelieves) {
  const RemoteCache honest = owner_->AddCache({2, 4, 64}, 1);
  RemoteCache lie = honest;
  lie.geometry.num_tensors = 4;
  lie.geometry.num_blocks = 1000;
  lie.geometry.tensor_bytes = uint64_t{1} << 62;
  lie.blob = AddressesOf(LocalCache({4, 4, 64}, 1).pin().cache());  // of the length that belongs to it
  LocalCache local({4, 1000, 64}, 2);
  const TransferOp bad[] = {
      {&lie, &local.pin(), 0, 0, 1, {{0, 0, 4 * 64 + 1}}},
      {&lie, &local.pin(), 0, 0, 1, {{4 * 64, 0, 1}}},
      {&lie, &local.pin(), 0, 0, 1, {{(uint64_t{1} << 62) - 8, 0, 8}}},
      {&lie, &local.pin(), 0, 0, 1, {{0, 0, 64}, {0, 64, 64}, {4 * 64 - 1, 128, 2}}},
      {&lie, &local.pin(), 1, 0, 2, {{0, 0, 64}}},
      {&lie, &local.pin(), 2, 0, 1, {{0, 0, 64}}},
  };
  for (const TransferOp &op : bad) {
    if (OwnerChecksPulls()) {
      EXPECT_EQ(path_->Pull(op, Soon()).code(), LLM_PARAM_INVALID);
    }
    EXPECT_EQ(path_->Push(op, Soon()).code(), LLM_PARAM_INVALID);
  }
  EXPECT_EQ(owner_->Bytes(honest.cache_id), PatternOf({2, 4, 64}, 1));
  EXPECT_TRUE(owner_->CanariesIntact(honest.cache_id));
  const TransferOp good{&honest, &local.pin(), 0, 0, 2, {{0, 0, 64}}};
  EXPECT_TRUE(path_->Pull(good, Soon()).ok()) << "a refusal must leave the path usable";
}

// ---- lifetime of the cache ----

TEST_P(TransportContract, CacheOfAnotherGenerationOrUnregisteredDoesNotExist) {
  const CacheShape shape{1, 4, 64};
  const RemoteCache gone = owner_->AddCache(shape, 1);
  const RemoteCache there = owner_->AddCache(shape, 2);
  RemoteCache stale = there;
  stale.generation += 1000;
  owner_->UnregisterAndReuse(gone.cache_id);
  LocalCache local(shape, 3);
  for (const RemoteCache *missing : {&gone, static_cast<const RemoteCache *>(&stale)}) {
    const TransferOp op{missing, &local.pin(), 0, 0, 1, {{0, 0, 64}}};
    EXPECT_EQ(path_->Pull(op, Soon()).code(), LLM_KV_CACHE_NOT_EXIST);
    EXPECT_EQ(path_->Push(op, Soon()).code(), LLM_KV_CACHE_NOT_EXIST);
  }
  const TransferOp op{&there, &local.pin(), 0, 0, 1, {{0, 0, 64}}};
  EXPECT_TRUE(path_->Pull(op, Soon()).ok());
  EXPECT_EQ(owner_->Bytes(there.cache_id), PatternOf(shape, 2));
}

// The owner reuses its memory the moment Unregister returned. A pull that says ok must have got none of that.
TEST_P(TransportContract, PullBesideUnregisterIsRightOrFails) {
  const CacheShape shape{4, 128, 4096};
  const std::vector<uint8_t> expected = PatternOf(shape, 4);
  LocalCache local(shape, 0);
  for (int round = 0; round < 10; ++round) {
    const RemoteCache remote = owner_->AddCache(shape, 4);
    const TransferOp op{&remote, &local.pin(), 0, 0, 4, {{0, 0, shape.num_blocks * shape.stride}}};
    std::atomic<int> pulls{0};
    Status last;
    std::thread puller([&] {
      do {
        local.Fill(std::vector<uint8_t>(expected.size()));
        last = path_->Pull(op, Soon());
        if (last.ok()) {
          ASSERT_TRUE(local.Bytes() == expected) << "pull " << pulls;
        }
        ++pulls;
      } while (last.ok());
    });
    while (pulls.load() < 2) {
      std::this_thread::yield();
    }
    owner_->UnregisterAndReuse(remote.cache_id);
    puller.join();
    ASSERT_EQ(last.code(), LLM_KV_CACHE_NOT_EXIST) << last.text();
  }
}

// ---- deadlines and ends ----

TEST_P(TransportContract, PassedDeadlineIsATimeout) {
  const RemoteCache remote = owner_->AddCache({1, 4, 64}, 1);
  LocalCache local({1, 4, 64}, 2);
  const TransferOp op{&remote, &local.pin(), 0, 0, 1, {{0, 0, 64}}};
  EXPECT_EQ(path_->Pull(op, Deadline::In(milliseconds(0))).code(), LLM_TIMEOUT);
  EXPECT_EQ(path_->Push(op, Deadline::In(milliseconds(0))).code(), LLM_TIMEOUT);
  EXPECT_EQ(local.Bytes(), PatternOf({1, 4, 64}, 2));
  EXPECT_EQ(owner_->Bytes(remote.cache_id), PatternOf({1, 4, 64}, 1));
}

TEST_P(TransportContract, CloseEndsRunningAndLaterCalls) {
  const CacheShape shape{8, 256, 4096};
  const RemoteCache remote = owner_->AddCache(shape, 1);
  LocalCache local(shape, 2);
  const TransferOp op{&remote, &local.pin(), 0, 0, 8, {{0, 0, shape.num_blocks * shape.stride}}};
  std::atomic<int> pulls{0};
  Status last;
  std::thread puller([&] {
    do {
      last = path_->Pull(op, Soon());
      ++pulls;
    } while (last.ok());
  });
  while (pulls.load() < 2) {
    std::this_thread::yield();
  }
  path_->Close();
  puller.join();
  EXPECT_EQ(last.code(), LLM_FAILED) << last.text();
  EXPECT_EQ(path_->Pull(op, Soon()).code(), LLM_FAILED);
  EXPECT_EQ(path_->Push(op, Soon()).code(), LLM_FAILED);
  const auto fresh = MakePath();
  EXPECT_TRUE(fresh->Pull(op, Soon()).ok());
}

INSTANTIATE_TEST_SUITE_P(All, TransportContract, kAllTransports, NameOf);

}  // namespace
}  // namespace datadist::test

int main(int argc, char **argv) { return datadist::test::TestMain(argc, argv); }
