// Caches by name: what an id, a key and an address mean, and how caches come to be allocated.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include "support/caches.h"

namespace datadist::testing {
namespace {

using llm_datadist::CacheDesc;
using llm_datadist::CachePlacement;
using llm_datadist::LLM_FEATURE_NOT_ENABLED;
using llm_datadist::LLM_KV_CACHE_NOT_EXIST;
using llm_datadist::LLM_OUT_OF_MEMORY;
using llm_datadist::LLM_PARAM_INVALID;
using llm_datadist::LLM_SUCCESS;
using ::testing::HasSubstr;

// ---- registered caches ----

TEST_F(CacheRegistryTest, RowsByTheirKeys) {
  const int64_t id = Register(CacheLayout::kContiguous, {Request(7), std::nullopt, Prefix(7), Request(7, 1)});
  EXPECT_EQ(id, 1);
  const std::pair<CacheKey, uint32_t> rows[] = {{Request(7), 0}, {Prefix(7), 2}, {Request(7, 1), 3}};
  for (const auto &[key, row] : rows) {
    const auto named = caches_.Find(CacheRef::Key(key));
    ASSERT_TRUE(named.ok()) << Text(key);
    EXPECT_EQ(named.value().pin.cache().id(), id);
    EXPECT_EQ(named.value().row, row);
    EXPECT_FALSE(named.value().lasting) << "the key can be removed";
  }
  for (const CacheKey &key : {Request(8), Prefix(7, 1), Blocks(0), Request(0)}) {
    EXPECT_EQ(FindCode(CacheRef::Key(key)), LLM_KV_CACHE_NOT_EXIST) << Text(key);
  }
}

TEST_F(CacheRegistryTest, BlocksKeyNamesTheWholeCache) {
  const int64_t id = Register(CacheLayout::kBlocks, {Blocks(3)});
  const auto named = caches_.Find(CacheRef::Key(Blocks(3)));
  ASSERT_TRUE(named.ok());
  EXPECT_EQ(named.value().pin.cache().id(), id);
  EXPECT_EQ(named.value().row, std::nullopt);
  EXPECT_FALSE(named.value().lasting) << "the next cache with this key takes it";
}

TEST_F(CacheRegistryTest, ByIdAndByAddress) {
  const int64_t id = Register(CacheLayout::kMix, {});
  const auto by_id = caches_.Find(CacheRef::Id(id));
  ASSERT_TRUE(by_id.ok());
  EXPECT_EQ(by_id.value().pin.cache().id(), id);
  EXPECT_EQ(by_id.value().row, std::nullopt);
  EXPECT_TRUE(by_id.value().lasting);
  const auto by_address = caches_.Find(CacheRef::Address(0x10010, 32));
  ASSERT_TRUE(by_address.ok());
  EXPECT_EQ(by_address.value().pin.cache().id(), id);
  EXPECT_EQ(by_address.value().tensor, 0U);
  EXPECT_EQ(by_address.value().offset, 16U);
  EXPECT_TRUE(by_address.value().lasting);
  for (const int64_t other : {int64_t{0}, int64_t{-1}, id + 1}) {
    EXPECT_EQ(FindCode(CacheRef::Id(other)), LLM_KV_CACHE_NOT_EXIST);
    EXPECT_EQ(Code(caches_.Pin(other)), LLM_KV_CACHE_NOT_EXIST);
  }
  EXPECT_EQ(FindCode(CacheRef::Address(0x10000, kPage + 1)), LLM_PARAM_INVALID);
}

TEST_F(CacheRegistryTest, FirstRequestKeyAndLastBlocksKeyWin) {
  const int64_t first = Register(CacheLayout::kContiguous, {Request(1), Prefix(1)});
  const int64_t second = Register(CacheLayout::kContiguous, {Prefix(1), Request(2), Request(1), Request(2)});
  EXPECT_EQ(CacheOf(CacheRef::Key(Request(1))), first);
  EXPECT_EQ(CacheOf(CacheRef::Key(Prefix(1))), first);
  EXPECT_EQ(CacheOf(CacheRef::Key(Request(2))), second);
  EXPECT_EQ(caches_.Find(CacheRef::Key(Request(2))).value().row, 1U);
  const int64_t third = Register(CacheLayout::kBlocks, {Blocks(1)});
  const int64_t fourth = Register(CacheLayout::kBlocks, {Blocks(1)});
  EXPECT_EQ(CacheOf(CacheRef::Key(Blocks(1))), fourth);
  caches_.Unregister(third);
  EXPECT_EQ(CacheOf(CacheRef::Key(Blocks(1))), fourth) << "its keys went to another cache before";
}

TEST_F(CacheRegistryTest, UnregisteringTakesTheKeys) {
  const int64_t id = Register(CacheLayout::kContiguous, {Request(1), Prefix(1)});
  const int64_t other = Register(CacheLayout::kContiguous, {Request(2)});
  caches_.Unregister(id);
  caches_.Unregister(id);
  caches_.Unregister(99);
  for (const CacheKey &key : {Request(1), Prefix(1)}) {
    EXPECT_EQ(FindCode(CacheRef::Key(key)), LLM_KV_CACHE_NOT_EXIST);
  }
  EXPECT_EQ(FindCode(CacheRef::Id(id)), LLM_KV_CACHE_NOT_EXIST);
  EXPECT_EQ(CacheOf(CacheRef::Key(Request(2))), other);
  EXPECT_EQ(CacheOf(CacheRef::Key(Request(1))), 0);
  const int64_t again = Register(CacheLayout::kContiguous, {Request(1)});
  EXPECT_EQ(CacheOf(CacheRef::Key(Request(1))), again);
}

TEST_F(CacheRegistryTest, ARefusedRegistrationBindsNothing) {
  const RowKeys keys = {Request(1)};
  const Registration contiguous{CacheLayout::kContiguous, true, false};
  EXPECT_EQ(Code(caches_.Register(Desc(1, 4), {0}, contiguous, keys)), LLM_PARAM_INVALID);
  EXPECT_EQ(Code(caches_.Register(Desc(1, 4), {}, contiguous, keys)), LLM_PARAM_INVALID);
  CacheDesc shapeless = Desc(1, 4);
  shapeless.shape.clear();
  EXPECT_EQ(Code(caches_.Register(shapeless, {0x10000}, contiguous, keys)), LLM_PARAM_INVALID);
  const auto crowded = caches_.Register(Desc(1, 4), {0x10000}, contiguous, {5, Request(1)});
  EXPECT_EQ(Code(crowded), LLM_PARAM_INVALID);
  EXPECT_THAT(crowded.status().text(), HasSubstr("5 cache keys: at most 4"));
  EXPECT_EQ(Code(caches_.Register(Desc(1, 4), {0x10000}, contiguous, {Request(1), Blocks(1)})), LLM_PARAM_INVALID);
  const Registration blocks{CacheLayout::kBlocks, true, false};
  EXPECT_EQ(Code(caches_.Register(Desc(1, 4), {0x10000}, blocks, {Request(1)})), LLM_PARAM_INVALID);
  EXPECT_EQ(Code(caches_.Register(Desc(1, 4), {0x10000}, blocks, {Blocks(1), Blocks(2)})), LLM_PARAM_INVALID);
  for (const CacheKey &key : {Request(1), Blocks(1)}) {
    EXPECT_EQ(FindCode(CacheRef::Key(key)), LLM_KV_CACHE_NOT_EXIST);
  }
}

TEST_F(CacheRegistryTest, KeysOfRegisteredCachesStayUntilTheyAreRemoved) {
  const int64_t id = Register(CacheLayout::kContiguous, {Request(1)});
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(Consume(Request(1), GenerationOf(id), 0, 1), LLM_SUCCESS);
    EXPECT_EQ(caches_.Deallocate(id).code(), LLM_SUCCESS);
    EXPECT_EQ(CacheOf(CacheRef::Key(Request(1))), id);
    EXPECT_EQ(CacheOf(CacheRef::Id(id)), id);
  }
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(caches_.RemoveKey(Request(1)).code(), LLM_SUCCESS);
    EXPECT_EQ(FindCode(CacheRef::Key(Request(1))), LLM_KV_CACHE_NOT_EXIST);
    EXPECT_EQ(CacheOf(CacheRef::Id(id)), id);
  }
}

TEST_F(CacheRegistryTest, TwoSidedPeersMayNameEveryCache) {
  const int64_t id = Register(CacheLayout::kContiguous, {Request(1)}, false);
  EXPECT_EQ(CacheOf(CacheRef::Id(id)), id);
  EXPECT_EQ(CacheOf(CacheRef::Key(Request(1))), id);
  EXPECT_EQ(CacheOf(CacheRef::Address(0x10000, 1)), id);
}

TEST_F(CacheRegistryTest, OneSidedPeersMayNameAccessibleCachesAndConsumeNothing) {
  CacheRegistry caches(regions_, {pool_, nullptr}, false);
  const auto hidden = caches.Register(Desc(1, 4), {0x10000}, {CacheLayout::kContiguous, false, false}, {Request(1)});
  for (const CacheRef &ref :
       {CacheRef::Id(hidden.value()), CacheRef::Key(Request(1)), CacheRef::Address(0x10000, 1)}) {
    const auto named = caches.Find(ref);
    EXPECT_EQ(Code(named), LLM_PARAM_INVALID);
    EXPECT_THAT(named.status().text(), HasSubstr("not remote accessible"));
  }
  EXPECT_TRUE(caches.Pin(hidden.value()).ok()) << "its own process may";
  const auto made = caches.Allocate(Desc(1, 4), CacheLayout::kContiguous, {Request(2)});
  const uint64_t generation = caches.Pin(made.value().cache_id).value().cache().generation();
  EXPECT_TRUE(caches.Consume(Request(2), generation, 0, 1).ok());
  EXPECT_TRUE(caches.Find(CacheRef::Key(Request(2))).ok());
  caches.Clear();
}

// ---- allocated caches ----

TEST_F(CacheRegistryTest, AllocatesOneAddressPerTensor) {
  const auto made = caches_.Allocate(Desc(3, 4), CacheLayout::kContiguous, {});
  ASSERT_TRUE(made.ok()) << made.status().text();
  ASSERT_EQ(made.value().addrs.size(), 3U);
  EXPECT_EQ(Used(), 3U);
  const CachePin pin = std::move(caches_.Pin(made.value().cache_id)).value();
  EXPECT_EQ(pin.cache().addrs(), made.value().addrs);
  EXPECT_EQ(pin.cache().geometry().layout, CacheLayout::kContiguous);
  EXPECT_TRUE(pin.cache().owned());
  EXPECT_TRUE(pin.cache().remote_accessible());
  for (const uint64_t address : made.value().addrs) {
    std::memset(reinterpret_cast<void *>(static_cast<uintptr_t>(address)), 1, kPage);
  }
}

TEST_F(CacheRegistryTest, AllocationRefusals) {
  const auto refused = [this](const CacheDesc &desc, CacheLayout layout, const RowKeys &keys, const std::string &said) {
    const auto made = caches_.Allocate(desc, layout, keys);
    EXPECT_EQ(Code(made), LLM_PARAM_INVALID);
    EXPECT_THAT(made.status().text(), HasSubstr(said));
  };
  Allocate(CacheLayout::kContiguous, {Request(1)});
  Register(CacheLayout::kContiguous, {Prefix(2)});
  const uint64_t used = Used();
  const auto contiguous = CacheLayout::kContiguous;
  refused(Desc(1, 4, CachePlacement::kHost), contiguous, {}, "llm.HostMemPoolConfig");
  refused(Desc(0, 4), contiguous, {}, "num_tensors is 0, allowed: 1..65536");
  refused(Desc(65537, 4), contiguous, {}, "num_tensors is 65537, allowed: 1..65536");
  refused({CachePlacement::kDevice, 1, ge::DT_INT8, {-1}, {}}, contiguous, {}, "shape[0] = -1");
  refused(Desc(1, 4), contiguous, {5, std::nullopt}, "5 cache keys: at most 4");
  refused(Desc(1, 4), CacheLayout::kBlocks, {2, std::nullopt}, "2 cache keys: at most 1");
  refused(Desc(1, 4), contiguous, {Request(5), std::nullopt, Request(5)}, "key request 5 of model 0 is given twice");
  refused(Desc(1, 4), contiguous, {Request(6), Request(1)}, "key request 1 of model 0 is bound already, to cache 1");
  refused(Desc(1, 4), contiguous, {Prefix(2)}, "bound already, to cache 2");
  refused(Desc(1, 4), contiguous, {Blocks(0)}, "key blocks of model 0");
  EXPECT_EQ(Used(), used);
  EXPECT_EQ(FindCode(CacheRef::Key(Request(6))), LLM_KV_CACHE_NOT_EXIST);
}

TEST_F(CacheRegistryTest, LimitOfAddressesIsNotForPools) {
  RegionLimits limits;
  limits.max_addrs_per_cache = 2;
  CacheRegistry caches(RegionTable::Create(limits), {pool_, nullptr}, true);
  EXPECT_TRUE(caches.Allocate(Desc(3, 4), CacheLayout::kContiguous, {}).ok());
}

TEST_F(CacheRegistryTest, ExhaustionTakesNothing) {
  Allocate(CacheLayout::kContiguous, {}, 10);
  const auto made = caches_.Allocate(Desc(7, 4), CacheLayout::kContiguous, {Request(1)});
  EXPECT_EQ(Code(made), LLM_OUT_OF_MEMORY);
  EXPECT_THAT(made.status().text(), HasSubstr("tensor 6 of 7"));
  EXPECT_EQ(FindCode(CacheRef::Key(Request(1))), LLM_KV_CACHE_NOT_EXIST);
  Allocate(CacheLayout::kContiguous, {Request(1)}, 6);
  EXPECT_EQ(Used(), kPoolPages);
}

TEST_F(CacheRegistryTest, ByteLimitRefusesWithoutKeepingMemory) {
  RegionLimits limits;
  limits.max_device_bytes = 3 * kPage;
  CacheRegistry caches(RegionTable::Create(limits), {pool_, nullptr}, true);
  EXPECT_EQ(Code(caches.Allocate(Desc(4, 4), CacheLayout::kContiguous, {Request(1)})), LLM_PARAM_INVALID);
  EXPECT_EQ(Used(), 0U);
  EXPECT_TRUE(caches.Allocate(Desc(3, 4), CacheLayout::kContiguous, {Request(1)}).ok());
}

TEST_F(CacheRegistryTest, WithoutAnyPool) {
  CacheRegistry caches(regions_, {}, true);
  EXPECT_EQ(Code(caches.Allocate(Desc(0, 4), CacheLayout::kContiguous, {})), LLM_FEATURE_NOT_ENABLED);
  EXPECT_EQ(caches.Deallocate(1).code(), LLM_FEATURE_NOT_ENABLED);
  EXPECT_EQ(caches.RemoveKey(Request(1)).code(), LLM_SUCCESS);
}

// Programs that do not allocate reserve nothing.
TEST_F(CacheRegistryTest, DefaultPoolsAreMadeWhenTheyAreNeeded) {
  const PoolConfig more_than_there_is{uint64_t{1} << 62};
  CacheRegistry caches(RegionTable::Create({}), {nullptr, nullptr, PoolConfig{4 * kPage, 12}, more_than_there_is}, true);
  EXPECT_TRUE(caches.Deallocate(1).ok());
  const auto made = caches.Allocate(Desc(4, 4), CacheLayout::kMix, {});
  ASSERT_TRUE(made.ok()) << made.status().text();
  EXPECT_EQ(Code(caches.Allocate(Desc(1, 4), CacheLayout::kMix, {})), LLM_OUT_OF_MEMORY) << "the same pool again";
  EXPECT_EQ(Code(caches.Allocate(Desc(1, 4, CachePlacement::kHost), CacheLayout::kMix, {})), LLM_OUT_OF_MEMORY);
}

TEST_F(CacheRegistryTest, PlacementChoosesThePool) {
  const auto host = NewPool();
  CacheRegistry caches(regions_, {pool_, host}, true);
  ASSERT_TRUE(caches.Allocate(Desc(1, 4), CacheLayout::kBlocks, {}).ok());
  ASSERT_TRUE(caches.Allocate(Desc(2, 4, CachePlacement::kHost), CacheLayout::kBlocks, {}).ok());
  EXPECT_EQ(pool_->used(), kPage);
  EXPECT_EQ(host->used(), 2 * kPage);
  CacheRegistry host_only(regions_, {nullptr, host}, true);
  const auto made = host_only.Allocate(Desc(1, 4), CacheLayout::kBlocks, {});
  EXPECT_EQ(Code(made), LLM_PARAM_INVALID);
  EXPECT_THAT(made.status().text(), HasSubstr("no device memory pool, set option llm.MemPoolConfig"));
  EXPECT_TRUE(host_only.Deallocate(7).ok());
}

}  // namespace
}  // namespace datadist::testing
