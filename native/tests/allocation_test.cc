// Caches in memory of the engine's own, and copies within a process: what programs for the first generation of the API
// are made of.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "support/node.h"

namespace datadist::testing {
namespace {

using namespace llm_datadist;  // the codes, which every line here names
using ::testing::HasSubstr;

constexpr uint64_t kTensors = 3;
constexpr int64_t kBlocks = 4;
constexpr int64_t kStride = 64;
constexpr char kPoolOption[] = "llm.MemPoolConfig";

CacheDesc Desc(CachePlacement placement = CachePlacement::kDevice) {
  CacheDesc desc{};
  desc.placement = placement;
  desc.num_tensors = kTensors;
  desc.data_type = DT_UINT8;
  desc.shape = {kBlocks, kStride};
  return desc;
}

Bytes ContentsOf(const Cache &cache) {
  Bytes bytes;
  for (const uintptr_t address : cache.tensor_addrs) {
    const auto *const start = reinterpret_cast<const uint8_t *>(address);
    bytes.insert(bytes.end(), start, start + kBlocks * kStride);
  }
  return bytes;
}

void Fill(const Cache &cache, uint32_t seed) {
  for (uint64_t tensor = 0; tensor < cache.tensor_addrs.size(); ++tensor) {
    auto *const bytes = reinterpret_cast<uint8_t *>(cache.tensor_addrs[tensor]);
    for (uint64_t offset = 0; offset < kBlocks * kStride; ++offset) {
      bytes[offset] = PatternByte(seed, tensor, offset);
    }
  }
}

// [offset, +length) of each tensor of `from` at `to_offset` of `to`.
void CopyPart(const Bytes &from, uint64_t offset, Bytes &to, uint64_t to_offset, uint64_t length) {
  for (uint64_t tensor = 0; tensor < kTensors; ++tensor) {
    const uint64_t base = tensor * kBlocks * kStride;
    std::memcpy(&to[base + to_offset], &from[base + offset], length);
  }
}

class Allocation : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_EQ(node_.Start(ClientOptions()), LLM_SUCCESS) << GetLastErrorText(); }
  Cache Allocate(uint32_t seed, CachePlacement placement = CachePlacement::kDevice) {
    Cache cache{};
    EXPECT_EQ(node_.datadist().AllocateCache(Desc(placement), cache), LLM_SUCCESS) << GetLastErrorText();
    Fill(cache, seed);
    return cache;
  }
  Node node_{1};
};

TEST_F(Allocation, StartsAsZerosAndIsDescribed) {
  Cache cache{};
  ASSERT_EQ(node_.datadist().AllocateCache(Desc(), cache), LLM_SUCCESS) << GetLastErrorText();
  EXPECT_EQ(cache.cache_id, 1);
  EXPECT_EQ(cache.cache_desc.num_tensors, kTensors);
  EXPECT_EQ(cache.cache_desc.shape, Desc().shape);
  ASSERT_EQ(cache.tensor_addrs.size(), kTensors);
  EXPECT_EQ(ContentsOf(cache), Bytes(kTensors * kBlocks * kStride, 0));
}

TEST_F(Allocation, Refusals) {
  Cache cache{};
  CacheDesc wrong = Desc();
  wrong.num_tensors = 0;
  EXPECT_EQ(node_.datadist().AllocateCache(wrong, cache), LLM_PARAM_INVALID);
  wrong = Desc();
  wrong.shape.clear();
  EXPECT_EQ(node_.datadist().AllocateCache(wrong, cache), LLM_PARAM_INVALID);
  EXPECT_EQ(cache.cache_id, -1) << "written on success only";
  EXPECT_EQ(node_.datadist().DeallocateCache(77), LLM_SUCCESS);
}

TEST(AllocationPool, FullOnesSayWhichMemoryIsShort) {
  for (const char *option : {kPoolOption, "llm.HostMemPoolConfig"}) {
    Node node(1);
    ASSERT_EQ(node.Start(ClientOptions({{option, R"({"memory_size": 12288, "page_shift": 12})"}})), LLM_SUCCESS);
    const bool device = option == kPoolOption;
    const CacheDesc desc = Desc(device ? CachePlacement::kDevice : CachePlacement::kHost);
    Cache first{};
    ASSERT_EQ(node.datadist().AllocateCache(desc, first), LLM_SUCCESS) << GetLastErrorText();
    Cache second{};
    EXPECT_EQ(node.datadist().AllocateCache(desc, second), device ? LLM_DEVICE_OUT_OF_MEMORY : LLM_OUT_OF_MEMORY);
    ASSERT_EQ(node.datadist().DeallocateCache(first.cache_id), LLM_SUCCESS);
    EXPECT_EQ(node.datadist().AllocateCache(desc, second), LLM_SUCCESS) << "a client that waits gets its turn";
  }
}

TEST_F(Allocation, CachesAreTransferred) {
  Node server(2);
  ASSERT_EQ(server.Start(ServerOptions()), LLM_SUCCESS);
  Cache theirs{};
  ASSERT_EQ(server.datadist().AllocateCache(Desc(), theirs), LLM_SUCCESS);
  Fill(theirs, 7);
  const Cache mine = Allocate(8);
  ASSERT_EQ(node_.Link(2, server.port()), LLM_SUCCESS) << GetLastErrorText();
  Bytes expected = ContentsOf(mine);
  ASSERT_EQ(node_.datadist().PullKvCache({2, theirs.cache_id, 3, {}}, mine, 1), LLM_SUCCESS) << GetLastErrorText();
  CopyPart(ContentsOf(theirs), 3 * kStride, expected, 1 * kStride, kStride);
  EXPECT_EQ(ContentsOf(mine), expected);
  ASSERT_EQ(node_.datadist().PushKvBlocks(mine, {2, theirs.cache_id, 0, {}}, {1, 0}, {0, 3}), LLM_SUCCESS)
      << GetLastErrorText();
  EXPECT_EQ(std::memcmp(reinterpret_cast<void *>(theirs.tensor_addrs[0]), expected.data() + kStride, kStride), 0);
  ASSERT_EQ(server.datadist().DeallocateCache(theirs.cache_id), LLM_SUCCESS);
  EXPECT_EQ(node_.datadist().PullKvCache({2, theirs.cache_id, 0, {}}, mine), LLM_KV_CACHE_NOT_EXIST);
}

TEST_F(Allocation, CopiesOfRows) {
  const Cache src = Allocate(1);
  const Cache dst = Allocate(2, CachePlacement::kHost);
  const Bytes from = ContentsOf(src);
  Bytes expected = ContentsOf(dst);
  ASSERT_EQ(node_.datadist().CopyKvCache(src, dst, 3, 1), LLM_SUCCESS) << GetLastErrorText();
  CopyPart(from, 3 * kStride, expected, 1 * kStride, kStride);
  ASSERT_EQ(node_.datadist().CopyKvCache(src, dst, 0, 2, 8, 16), LLM_SUCCESS) << GetLastErrorText();
  CopyPart(from, 8, expected, 2 * kStride + 8, 16);
  ASSERT_EQ(node_.datadist().CopyKvCache(src, dst, 0, 0, 60), LLM_SUCCESS) << GetLastErrorText();
  CopyPart(from, 60, expected, 60, 4);
  EXPECT_EQ(ContentsOf(dst), expected);

  EXPECT_EQ(node_.datadist().CopyKvCache(src, dst, kBlocks, 0), LLM_PARAM_INVALID);
  EXPECT_EQ(node_.datadist().CopyKvCache(src, dst, 0, kBlocks), LLM_PARAM_INVALID);
  EXPECT_EQ(node_.datadist().CopyKvCache(src, dst, 0, 0, kStride), LLM_PARAM_INVALID);
  EXPECT_EQ(node_.datadist().CopyKvCache(src, dst, 0, 0, 1, kStride), LLM_PARAM_INVALID);
  EXPECT_EQ(node_.datadist().CopyKvCache(src, dst, 0, 0, 0, 0), LLM_PARAM_INVALID);
  EXPECT_EQ(node_.datadist().CopyKvCache(src, Cache{}), LLM_KV_CACHE_NOT_EXIST);
  EXPECT_EQ(ContentsOf(dst), expected);
}

TEST_F(Allocation, CopiesOfBlocksToSeveralLists) {
  const Cache src = Allocate(1);
  const Cache dst = Allocate(2);
  const Bytes from = ContentsOf(src);
  Bytes expected = ContentsOf(dst);
  ASSERT_EQ(node_.datadist().CopyKvBlocks(src, dst, {1, 2}, {{0, 1}, {3, 2}}), LLM_SUCCESS) << GetLastErrorText();
  for (const auto &[source, destination] : {std::pair(1, 0), std::pair(2, 1), std::pair(1, 3), std::pair(2, 2)}) {
    CopyPart(from, source * kStride, expected, destination * kStride, kStride);
  }
  EXPECT_EQ(ContentsOf(dst), expected);
  ASSERT_EQ(node_.datadist().CopyKvBlocks(src, src, {0}, {{2}}), LLM_SUCCESS) << "within one cache";

  for (const std::vector<std::vector<uint64_t>> &lists :
       {std::vector<std::vector<uint64_t>>{}, {{0}}, {{0, 1}, {0}}, {{0, kBlocks}}}) {
    EXPECT_EQ(node_.datadist().CopyKvBlocks(src, dst, {1, 2}, lists), LLM_PARAM_INVALID);
  }
  EXPECT_EQ(node_.datadist().CopyKvBlocks(src, dst, {kBlocks}, {{0}}), LLM_PARAM_INVALID);
  Cache unknown = dst;
  unknown.cache_id = 99;
  EXPECT_EQ(node_.datadist().CopyKvBlocks(src, unknown, {0}, {{0}}), LLM_KV_CACHE_NOT_EXIST);
  EXPECT_EQ(ContentsOf(dst), expected) << "what is refused copies nothing";
}

// Blocks go out to memory of the caller's and come back.
TEST_F(Allocation, CopiesOfBlocksToMemoryThatIsNotRegistered) {
  const Cache src = Allocate(1);
  Bytes memory(kTensors * kBlocks * kStride, 0xEE);
  Cache host{};
  host.cache_desc = Desc(CachePlacement::kHost);
  for (uint64_t tensor = 0; tensor < kTensors; ++tensor) {
    host.tensor_addrs.push_back(reinterpret_cast<uintptr_t>(&memory[tensor * kBlocks * kStride]));
  }
  Bytes expected = memory;
  CopyPart(ContentsOf(src), 2 * kStride, expected, 0, kStride);
  ASSERT_EQ(node_.datadist().CopyKvBlocks(src, host, {2}, {{0}}), LLM_SUCCESS) << GetLastErrorText();
  EXPECT_EQ(memory, expected);
  ASSERT_EQ(node_.datadist().CopyKvBlocks(host, src, {3}, {{1}}), LLM_SUCCESS) << GetLastErrorText();
  EXPECT_EQ(std::memcmp(reinterpret_cast<void *>(src.tensor_addrs[0] + kStride), &memory[3 * kStride], kStride), 0);

  EXPECT_EQ(node_.datadist().CopyKvBlocks(src, host, {0}, {{kBlocks}}), LLM_PARAM_INVALID);
  host.tensor_addrs.pop_back();
  EXPECT_EQ(node_.datadist().CopyKvBlocks(src, host, {0}, {{0}}), LLM_PARAM_INVALID);
  EXPECT_THAT(GetLastErrorText(), HasSubstr("tensor_addrs has 2 entries"));
  host.tensor_addrs.push_back(host.tensor_addrs[0]);
  host.cache_desc.shape = {kBlocks, kStride / 2};
  EXPECT_EQ(node_.datadist().CopyKvBlocks(src, host, {0}, {{0}}), LLM_PARAM_INVALID);
  EXPECT_THAT(GetLastErrorText(), HasSubstr("a block of src_cache has 64 bytes, one of dst_cache 32"));
  EXPECT_EQ(memory, expected);
}

}  // namespace
}  // namespace datadist::testing
