// Keys, descriptions and a registry with a pool of 16 pages, for tests of caches by name.
#ifndef DATADIST_TESTS_SUPPORT_CACHES_H_
#define DATADIST_TESTS_SUPPORT_CACHES_H_

#include <gtest/gtest.h>

#include <memory>

#include "cache/cache_registry.h"

namespace datadist::testing {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kPoolPages = 16;

inline CacheKey Request(uint64_t id, uint64_t model = 0) { return {KeyKind::kRequest, id, model}; }
inline CacheKey Prefix(uint64_t id, uint64_t model = 0) { return {KeyKind::kPrefix, id, model}; }
inline CacheKey Blocks(uint64_t model) { return {KeyKind::kBlocks, 0, model}; }

template <typename T>
llm_datadist::Status Code(const Result<T> &result) {
  return result.ok() ? llm_datadist::LLM_SUCCESS : result.status().code();
}

// Every tensor takes exactly one page of a pool.
inline llm_datadist::CacheDesc Desc(uint32_t num_tensors, int64_t rows,
                                    llm_datadist::CachePlacement placement = llm_datadist::CachePlacement::kDevice) {
  return {placement, num_tensors, ge::DT_INT8, {rows, static_cast<int64_t>(kPage) / rows}, {}};
}

class CacheRegistryTest : public ::testing::Test {
 protected:
  static std::shared_ptr<MemoryPool> NewPool() { return MemoryPool::Create({kPoolPages * kPage, 12}).value(); }

  int64_t Register(CacheLayout layout, const RowKeys &keys, bool remote_accessible = true, uint64_t address = 0x10000) {
    const auto id = caches_.Register(Desc(1, 4), {address}, {layout, remote_accessible, false}, keys);
    EXPECT_TRUE(id.ok()) << id.status().text();
    return id.ok() ? id.value() : 0;
  }
  int64_t Allocate(CacheLayout layout, const RowKeys &keys, uint32_t num_tensors = 2) {
    const auto made = caches_.Allocate(Desc(num_tensors, 4), layout, keys);
    EXPECT_TRUE(made.ok()) << made.status().text();
    return made.ok() ? made.value().cache_id : 0;
  }
  llm_datadist::Status FindCode(const CacheRef &ref) { return Code(caches_.Find(ref)); }
  // The cache that a name means, 0 for none.
  int64_t CacheOf(const CacheRef &ref) {
    const auto named = caches_.Find(ref);
    return named.ok() ? named.value().pin.cache().id() : 0;
  }
  uint64_t GenerationOf(int64_t cache_id) { return caches_.Pin(cache_id).value().cache().generation(); }
  llm_datadist::Status Consume(const CacheKey &key, uint64_t generation, uint32_t first = 0, uint32_t count = 2) {
    return caches_.Consume(key, generation, first, count).code();
  }
  uint64_t Used() const { return pool_->used() / kPage; }

  const std::shared_ptr<RegionTable> regions_ = RegionTable::Create({});
  const std::shared_ptr<MemoryPool> pool_ = NewPool();
  CacheRegistry caches_{regions_, {pool_, nullptr}, true};
};

}  // namespace datadist::testing

#endif  // DATADIST_TESTS_SUPPORT_CACHES_H_
