// CacheRegistry beside a slow model of it, through thousands of random calls.
//
// The model keeps no counts: whether a cache lives, and which names it has, is worked out anew from what was called.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "support/caches.h"

namespace datadist::testing {
namespace {

using llm_datadist::LLM_KV_CACHE_NOT_EXIST;
using llm_datadist::LLM_OUT_OF_MEMORY;
using llm_datadist::LLM_PARAM_INVALID;
using llm_datadist::LLM_SUCCESS;

constexpr int64_t kRows = 3;

struct ModelCache {
  CacheLayout layout = CacheLayout::kContiguous;
  uint32_t num_tensors = 0;
  bool owned = false;
  bool accessible = true;
  bool has_id = true;  // neither unregistered nor deallocated
  uint64_t generation = 0;
  uint64_t pins = 0;
};

struct ModelBinding {
  int64_t cache_id = 0;
  uint32_t row = 0;
  std::set<uint32_t> pulled;
};

class Model {
 public:
  explicit Model(bool two_sided) : two_sided_(two_sided) {}

  bool Lives(int64_t id) const {
    const auto bound = [id](const auto &entry) { return entry.second.cache_id == id; };
    const auto cache = caches.find(id);
    return cache != caches.end() &&
           (cache->second.has_id || (cache->second.owned && std::any_of(keys.begin(), keys.end(), bound)));
  }
  uint64_t UsedPages() const {
    uint64_t pages = 0;
    for (const auto &[id, cache] : caches) {
      pages += cache.owned && (Lives(id) || cache.pins != 0) ? cache.num_tensors : 0;
    }
    return pages;
  }
  llm_datadist::Status KeysFit(CacheLayout layout, const RowKeys &given) const {
    bool fit = given.size() <= (layout == CacheLayout::kBlocks ? 1U : static_cast<size_t>(kRows));
    for (const auto &key : given) {
      fit = fit && (!key || (key->kind == KeyKind::kBlocks) == (layout == CacheLayout::kBlocks));
    }
    return fit ? LLM_SUCCESS : LLM_PARAM_INVALID;
  }
  llm_datadist::Status Allocatable(CacheLayout layout, const RowKeys &given, uint32_t num_tensors) const {
    bool fit = KeysFit(layout, given) == LLM_SUCCESS;
    for (const auto &key : given) {
      fit = fit && (!key || (std::count(given.begin(), given.end(), key) == 1 && keys.count(*key) == 0));
    }
    if (!fit) {
      return LLM_PARAM_INVALID;
    }
    return UsedPages() + num_tensors > kPoolPages ? LLM_OUT_OF_MEMORY : LLM_SUCCESS;
  }
  void Bind(int64_t id, const RowKeys &given) {
    for (uint32_t row = 0; row < given.size(); ++row) {
      if (given[row] && (given[row]->kind == KeyKind::kBlocks || keys.count(*given[row]) == 0)) {
        keys[*given[row]] = ModelBinding{id, row, {}};
      }
    }
  }
  void DropKeysOf(int64_t id) {
    for (auto next = keys.begin(); next != keys.end();) {
      next = next->second.cache_id == id ? keys.erase(next) : std::next(next);
    }
  }
  void Deallocate(int64_t id) {
    const auto cache = caches.find(id);
    if (cache == caches.end() || !cache->second.owned) {
      return;
    }
    cache->second.has_id = false;
    if (cache->second.layout == CacheLayout::kBlocks) {
      DropKeysOf(id);
    }
  }
  llm_datadist::Status Consume(const CacheKey &key, uint64_t generation, uint32_t first, uint32_t count) {
    if (!two_sided_ || key.kind != KeyKind::kRequest) {
      return LLM_SUCCESS;
    }
    const auto bound = keys.find(key);
    if (bound == keys.end() || caches.at(bound->second.cache_id).generation != generation) {
      return LLM_KV_CACHE_NOT_EXIST;
    }
    const ModelCache &cache = caches.at(bound->second.cache_id);
    if (!cache.owned) {
      return LLM_SUCCESS;
    }
    if (uint64_t{first} + count > cache.num_tensors) {
      return LLM_PARAM_INVALID;
    }
    for (uint32_t tensor = first; tensor < first + count; ++tensor) {
      bound->second.pulled.insert(tensor);
    }
    if (bound->second.pulled.size() == cache.num_tensors) {
      keys.erase(bound);
    }
    return LLM_SUCCESS;
  }
  llm_datadist::Status Nameable(const ModelCache &cache) const {
    return two_sided_ || cache.accessible ? LLM_SUCCESS : LLM_PARAM_INVALID;
  }

  std::map<int64_t, ModelCache> caches;  // every one that ever was
  std::map<CacheKey, ModelBinding> keys;

 private:
  const bool two_sided_;
};

class Walk {
 public:
  Walk(unsigned seed, bool two_sided)
      : random_(seed), model_(two_sided), caches_(regions_, {pool_, nullptr}, two_sided) {}

  void Step() {
    switch (Below(10)) {
      case 0:
      case 1:
      case 2:
        return Allocate();
      case 3:
        return Register();
      case 4:
        return Unregister();
      case 5:
        return Deallocate();
      case 6:
        return RemoveKey();
      case 7:
        return Below(2) == 0 ? Pin() : Unpin();
      default:
        return Consume();
    }
  }

  void Check() {
    ASSERT_EQ(pool_->used() / kPage, model_.UsedPages());
    for (const auto &[id, cache] : model_.caches) {
      const bool named = cache.has_id;
      ASSERT_EQ(Code(caches_.Pin(id)), named ? LLM_SUCCESS : LLM_KV_CACHE_NOT_EXIST) << id;
      ASSERT_EQ(Code(caches_.Find(CacheRef::Id(id))), named ? model_.Nameable(cache) : LLM_KV_CACHE_NOT_EXIST) << id;
    }
    for (const CacheKey &key : AllKeys()) {
      const auto found = caches_.Find(CacheRef::Key(key));
      const auto bound = model_.keys.find(key);
      if (bound == model_.keys.end()) {
        ASSERT_EQ(Code(found), LLM_KV_CACHE_NOT_EXIST) << Text(key);
        continue;
      }
      const ModelCache &cache = model_.caches.at(bound->second.cache_id);
      ASSERT_EQ(Code(found), model_.Nameable(cache)) << Text(key);
      if (found.ok()) {
        ASSERT_EQ(found.value().pin.cache().id(), bound->second.cache_id) << Text(key);
        ASSERT_EQ(found.value().row.has_value(), key.kind != KeyKind::kBlocks);
        ASSERT_EQ(found.value().row.value_or(0), bound->second.row);
        ASSERT_FALSE(found.value().lasting);
      }
    }
  }

  void Finish() {
    while (!pins_.empty()) {
      Unpin();
    }
    caches_.Clear();
    EXPECT_EQ(pool_->used(), 0U);
  }

 private:
  uint32_t Below(uint32_t end) { return static_cast<uint32_t>(random_() % end); }
  static std::vector<CacheKey> AllKeys() {
    std::vector<CacheKey> all;
    for (uint64_t i = 0; i < 3; ++i) {
      for (const CacheKey &key : {Request(i), Request(i, 1), Prefix(i), Blocks(i)}) {
        all.push_back(key);
      }
    }
    return all;
  }
  CacheKey AnyKey() {
    const std::vector<CacheKey> all = AllKeys();
    return all[Below(static_cast<uint32_t>(all.size()))];
  }
  // Mostly keys that fit the layout.
  RowKeys AnyKeys(CacheLayout layout) {
    RowKeys keys(Below(layout == CacheLayout::kBlocks ? 3 : kRows + 2));
    for (auto &key : keys) {
      const CacheKey candidate = AnyKey();
      const bool fits = (candidate.kind == KeyKind::kBlocks) == (layout == CacheLayout::kBlocks);
      if (Below(3) != 0 && (fits || Below(30) == 0)) {
        key = candidate;
      }
    }
    return keys;
  }
  CacheLayout AnyLayout() { return Below(3) == 0 ? CacheLayout::kBlocks : CacheLayout::kContiguous; }
  int64_t AnyId() { return 1 + Below(static_cast<uint32_t>(model_.caches.size()) + 2); }

  void Note(int64_t id, const ModelCache &cache, const RowKeys &keys) {
    ASSERT_EQ(model_.caches.count(id), 0U) << "an id is given twice";
    model_.caches[id] = cache;
    model_.caches[id].generation = caches_.Pin(id).value().cache().generation();
    model_.Bind(id, keys);
  }
  void Allocate() {
    const CacheLayout layout = AnyLayout();
    const uint32_t num_tensors = 1 + Below(4);
    const RowKeys keys = AnyKeys(layout);
    const auto made = caches_.Allocate(Desc(num_tensors, kRows), layout, keys);
    ASSERT_EQ(Code(made), model_.Allocatable(layout, keys, num_tensors));
    if (made.ok()) {
      Note(made.value().cache_id, {layout, num_tensors, true, true, true, 0, 0}, keys);
    }
  }
  void Register() {
    const CacheLayout layout = AnyLayout();
    const RowKeys keys = AnyKeys(layout);
    const bool accessible = Below(2) == 0;
    const auto id = caches_.Register(Desc(1, kRows), {0x10000}, {layout, accessible, false}, keys);
    ASSERT_EQ(Code(id), model_.KeysFit(layout, keys));
    if (id.ok()) {
      Note(id.value(), {layout, 1, false, accessible, true, 0, 0}, keys);
    }
  }
  void Unregister() {
    const int64_t id = AnyId();
    const auto cache = model_.caches.find(id);
    if (cache != model_.caches.end() && cache->second.pins != 0) {
      return;  // it would wait for ourselves
    }
    caches_.Unregister(id);
    if (cache != model_.caches.end() && !cache->second.owned) {
      cache->second.has_id = false;
      model_.DropKeysOf(id);
    }
  }
  void Deallocate() {
    const int64_t id = AnyId();
    ASSERT_TRUE(caches_.Deallocate(id).ok());
    model_.Deallocate(id);
  }
  void RemoveKey() {
    const CacheKey key = AnyKey();
    ASSERT_TRUE(caches_.RemoveKey(key).ok());
    model_.keys.erase(key);
  }
  void Pin() {
    auto found = caches_.Find(CacheRef::Key(AnyKey()));
    if (found.ok()) {
      ++model_.caches.at(found.value().pin.cache().id()).pins;
      pins_.push_back(std::move(found.value().pin));
    }
  }
  void Unpin() {
    if (!pins_.empty()) {
      const auto pin = pins_.begin() + Below(static_cast<uint32_t>(pins_.size()));
      --model_.caches.at(pin->cache().id()).pins;
      pins_.erase(pin);
    }
  }
  void Consume() {
    const CacheKey key = AnyKey();
    const auto bound = model_.keys.find(key);
    const bool current = bound != model_.keys.end() && Below(4) != 0;
    const uint64_t generation = current ? model_.caches.at(bound->second.cache_id).generation : Below(20);
    const uint32_t first = Below(4);
    const uint32_t count = Below(5);
    ASSERT_EQ(caches_.Consume(key, generation, first, count).code(), model_.Consume(key, generation, first, count))
        << Text(key) << " " << generation << " " << first << " " << count;
  }

  std::mt19937 random_;
  Model model_;
  const std::shared_ptr<RegionTable> regions_ = RegionTable::Create({});
  const std::shared_ptr<MemoryPool> pool_ = MemoryPool::Create({kPoolPages * kPage, 12}).value();
  CacheRegistry caches_;
  std::vector<CachePin> pins_;
};

class CacheModel : public ::testing::TestWithParam<bool> {};

TEST_P(CacheModel, EveryCallAgrees) {
  for (unsigned seed = 1; seed <= 30; ++seed) {
    Walk walk(seed, GetParam());
    for (int step = 0; step < 150; ++step) {
      SCOPED_TRACE("seed " + std::to_string(seed) + " step " + std::to_string(step));
      walk.Step();
      walk.Check();
      if (HasFatalFailure()) {
        return;
      }
    }
    walk.Finish();
  }
}

INSTANTIATE_TEST_SUITE_P(Modes, CacheModel, ::testing::Bool(),
                         [](const auto &mode) { return mode.param ? "TwoSided" : "OneSided"; });

}  // namespace
}  // namespace datadist::testing
