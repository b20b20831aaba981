// What keeps the memory of an allocated cache, and what pulls consume.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstddef>
#include <cstring>
#include <optional>
#include <thread>
#include <utility>

#include "support/caches.h"

namespace datadist::testing {
namespace {

using llm_datadist::LLM_KV_CACHE_NOT_EXIST;
using llm_datadist::LLM_PARAM_INVALID;
using llm_datadist::LLM_SUCCESS;
using ::testing::Each;
using ::testing::Ne;

using CacheReferencesTest = CacheRegistryTest;

// ---- references ----

TEST_F(CacheReferencesTest, MemoryLivesUntilTheIdAndEveryKeyAreDropped) {
  const int64_t id = Allocate(CacheLayout::kContiguous, {Request(1), std::nullopt, Prefix(2)});
  EXPECT_FALSE(caches_.Find(CacheRef::Id(id)).value().lasting);
  EXPECT_FALSE(caches_.Find(CacheRef::Key(Request(1))).value().lasting);
  ASSERT_TRUE(caches_.RemoveKey(Request(1)).ok());
  ASSERT_TRUE(caches_.RemoveKey(Request(1)).ok()) << "already removed";
  EXPECT_EQ(FindCode(CacheRef::Key(Request(1))), LLM_KV_CACHE_NOT_EXIST);
  EXPECT_EQ(CacheOf(CacheRef::Id(id)), id);
  ASSERT_TRUE(caches_.Deallocate(id).ok());
  ASSERT_TRUE(caches_.Deallocate(id).ok()) << "already dropped";
  EXPECT_EQ(Used(), 2U);
  EXPECT_EQ(CacheOf(CacheRef::Key(Prefix(2))), id);
  ASSERT_TRUE(caches_.RemoveKey(Prefix(2)).ok());
  EXPECT_EQ(Used(), 0U);
  EXPECT_EQ(FindCode(CacheRef::Key(Prefix(2))), LLM_KV_CACHE_NOT_EXIST);
}

TEST_F(CacheReferencesTest, ADroppedIdNamesNothing) {
  const auto made = caches_.Allocate(Desc(1, 4), CacheLayout::kContiguous, {Request(1)});
  const int64_t id = made.value().cache_id;
  const uint64_t address = made.value().addrs[0];
  EXPECT_EQ(CacheOf(CacheRef::Address(address, kPage)), id);
  EXPECT_FALSE(caches_.Find(CacheRef::Address(address, 1)).value().lasting);
  ASSERT_TRUE(caches_.Deallocate(id).ok());
  EXPECT_EQ(FindCode(CacheRef::Id(id)), LLM_KV_CACHE_NOT_EXIST);
  EXPECT_EQ(Code(caches_.Pin(id)), LLM_KV_CACHE_NOT_EXIST);
  EXPECT_EQ(FindCode(CacheRef::Address(address, 1)), LLM_PARAM_INVALID);
  EXPECT_EQ(CacheOf(CacheRef::Key(Request(1))), id);
}

TEST_F(CacheReferencesTest, DeallocateTakesTheKeyOfABlocksCacheAlong) {
  const int64_t id = Allocate(CacheLayout::kBlocks, {Blocks(1)});
  EXPECT_EQ(CacheOf(CacheRef::Key(Blocks(1))), id);
  ASSERT_TRUE(caches_.Deallocate(id).ok());
  EXPECT_EQ(Used(), 0U);
  EXPECT_EQ(FindCode(CacheRef::Key(Blocks(1))), LLM_KV_CACHE_NOT_EXIST);
}

TEST_F(CacheReferencesTest, ABlocksKeyTakenAwayLeavesTheAllocatedCache) {
  const int64_t allocated = Allocate(CacheLayout::kBlocks, {Blocks(1)});
  const int64_t registered = Register(CacheLayout::kBlocks, {Blocks(1)});
  EXPECT_EQ(CacheOf(CacheRef::Key(Blocks(1))), registered);
  EXPECT_EQ(CacheOf(CacheRef::Id(allocated)), allocated);
  ASSERT_TRUE(caches_.Deallocate(allocated).ok());
  EXPECT_EQ(Used(), 0U);
  EXPECT_EQ(CacheOf(CacheRef::Key(Blocks(1))), registered);
}

TEST_F(CacheReferencesTest, UnregisterDoesNotTouchAllocatedCaches) {
  const int64_t id = Allocate(CacheLayout::kContiguous, {Request(1)});
  caches_.Unregister(id);
  EXPECT_EQ(CacheOf(CacheRef::Id(id)), id);
  EXPECT_EQ(CacheOf(CacheRef::Key(Request(1))), id);
}

TEST_F(CacheReferencesTest, APinKeepsTheMemory) {
  const auto made = caches_.Allocate(Desc(2, 4), CacheLayout::kContiguous, {Request(1)});
  NamedCache named = std::move(caches_.Find(CacheRef::Key(Request(1)))).value();
  ASSERT_TRUE(caches_.Deallocate(made.value().cache_id).ok());
  ASSERT_EQ(Consume(Request(1), named.pin.cache().generation()), LLM_SUCCESS);
  EXPECT_EQ(Used(), 2U);
  const auto other = caches_.Allocate(Desc(2, 4), CacheLayout::kContiguous, {Request(1)});
  ASSERT_TRUE(other.ok()) << "the key is free again";
  for (const uint64_t address : other.value().addrs) {
    EXPECT_THAT(made.value().addrs, Each(Ne(address)));
  }
  named = NamedCache();
  EXPECT_EQ(Used(), 2U) << "the other cache's";
}

// ---- consumption ----

TEST_F(CacheReferencesTest, ExactlyOnePullByARequestKeySucceeds) {
  const int64_t id = Allocate(CacheLayout::kContiguous, {Request(1), Request(2)});
  const uint64_t generation = GenerationOf(id);
  EXPECT_EQ(Consume(Request(1), generation), LLM_SUCCESS);
  EXPECT_EQ(Consume(Request(1), generation), LLM_KV_CACHE_NOT_EXIST);
  EXPECT_EQ(FindCode(CacheRef::Key(Request(1))), LLM_KV_CACHE_NOT_EXIST);
  EXPECT_EQ(Used(), 2U);
  EXPECT_EQ(Consume(Request(2), generation), LLM_SUCCESS);
  EXPECT_EQ(CacheOf(CacheRef::Id(id)), id);
  ASSERT_TRUE(caches_.Deallocate(id).ok());
  EXPECT_EQ(Used(), 0U);
}

TEST_F(CacheReferencesTest, TheLastPullFreesADeallocatedCache) {
  const int64_t id = Allocate(CacheLayout::kContiguous, {Request(1)});
  const uint64_t generation = GenerationOf(id);
  ASSERT_TRUE(caches_.Deallocate(id).ok());
  EXPECT_EQ(Consume(Request(1), generation), LLM_SUCCESS);
  EXPECT_EQ(Used(), 0U);
}

TEST_F(CacheReferencesTest, AKeyIsConsumedOnceEveryTensorWasPulled) {
  const int64_t id = Allocate(CacheLayout::kContiguous, {Request(1), Request(2)}, 6);
  const uint64_t generation = GenerationOf(id);
  EXPECT_EQ(Consume(Request(1), generation, 4, 2), LLM_SUCCESS);
  EXPECT_EQ(Consume(Request(1), generation, 0, 2), LLM_SUCCESS);
  EXPECT_EQ(Consume(Request(1), generation, 0, 2), LLM_SUCCESS) << "the same layers again";
  EXPECT_EQ(Consume(Request(2), generation, 2, 2), LLM_SUCCESS) << "each key counts alone";
  EXPECT_EQ(CacheOf(CacheRef::Key(Request(1))), id);
  EXPECT_EQ(Consume(Request(1), generation, 2, 2), LLM_SUCCESS);
  EXPECT_EQ(FindCode(CacheRef::Key(Request(1))), LLM_KV_CACHE_NOT_EXIST);
  EXPECT_EQ(CacheOf(CacheRef::Key(Request(2))), id);
}

TEST_F(CacheReferencesTest, TensorsThatTheCacheDoesNotHave) {
  const int64_t id = Allocate(CacheLayout::kContiguous, {Request(1)});
  const uint64_t generation = GenerationOf(id);
  const std::pair<uint32_t, uint32_t> bad[] = {
      {0, 3}, {2, 1}, {3, 0}, {1, UINT32_MAX}, {UINT32_MAX, 1}, {UINT32_MAX, UINT32_MAX}};
  for (const auto &[first, count] : bad) {
    EXPECT_EQ(Consume(Request(1), generation, first, count), LLM_PARAM_INVALID) << first << " " << count;
  }
  EXPECT_EQ(Consume(Request(1), generation, 0, 0), LLM_SUCCESS);
  EXPECT_EQ(CacheOf(CacheRef::Key(Request(1))), id);
}

TEST_F(CacheReferencesTest, PrefixAndBlocksKeysAreNotConsumed) {
  const int64_t id = Allocate(CacheLayout::kContiguous, {Prefix(1)});
  const int64_t blocks = Allocate(CacheLayout::kBlocks, {Blocks(1)});
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(Consume(Prefix(1), GenerationOf(id)), LLM_SUCCESS);
    EXPECT_EQ(Consume(Blocks(1), GenerationOf(blocks)), LLM_SUCCESS);
  }
  EXPECT_EQ(CacheOf(CacheRef::Key(Prefix(1))), id);
  EXPECT_EQ(CacheOf(CacheRef::Key(Blocks(1))), blocks);
}

TEST_F(CacheReferencesTest, ALatePullDoesNotConsumeTheKeysNextCache) {
  const int64_t first = Allocate(CacheLayout::kContiguous, {Request(1)});
  const uint64_t generation = GenerationOf(first);
  ASSERT_TRUE(caches_.RemoveKey(Request(1)).ok());
  EXPECT_EQ(Consume(Request(1), generation), LLM_KV_CACHE_NOT_EXIST);
  const int64_t second = Allocate(CacheLayout::kContiguous, {Request(1)});
  EXPECT_EQ(Consume(Request(1), generation), LLM_KV_CACHE_NOT_EXIST);
  EXPECT_EQ(CacheOf(CacheRef::Key(Request(1))), second);
}

// ---- the end ----

TEST_F(CacheReferencesTest, ClearDropsEverythingAndWaitsForPins) {
  Register(CacheLayout::kContiguous, {Request(1)});
  const int64_t id = Allocate(CacheLayout::kContiguous, {Request(2)});
  CachePin pin = std::move(caches_.Pin(id)).value();
  std::atomic<bool> released{false};
  std::thread other([&] {
    released = true;
    pin = CachePin();
  });
  caches_.Clear();
  EXPECT_TRUE(released.load());
  other.join();
  EXPECT_EQ(Used(), 0U);
  for (const CacheKey &key : {Request(1), Request(2)}) {
    EXPECT_EQ(FindCode(CacheRef::Key(key)), LLM_KV_CACHE_NOT_EXIST);
  }
  EXPECT_EQ(Code(caches_.Pin(id)), LLM_KV_CACHE_NOT_EXIST);
  caches_.Clear();
}

TEST_F(CacheReferencesTest, MemoryOutlivesTheRegistryWhileItIsPinned) {
  CachePin pin;
  {
    CacheRegistry caches(regions_, {NewPool(), nullptr}, true);
    const auto made = caches.Allocate(Desc(1, 4), CacheLayout::kContiguous, {});
    pin = std::move(caches.Pin(made.value().cache_id)).value();
  }
  std::byte *const first = pin.Resolve(0, 0, kPage).value();
  std::memset(first, 0x5A, kPage);
  EXPECT_EQ(first[kPage - 1], std::byte{0x5A});
}

}  // namespace
}  // namespace datadist::testing
