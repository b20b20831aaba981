// How a cache is named, by its owner's peers as well: by cache id, by a key, or by an address inside it.
#ifndef DATADIST_CACHE_CACHE_KEY_H_
#define DATADIST_CACHE_CACHE_KEY_H_

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace datadist {

// kRequest and kPrefix name one row of a contiguous cache; kBlocks, with id 0, a whole blocks cache.
enum class KeyKind : uint8_t { kRequest = 1, kPrefix = 2, kBlocks = 3 };

struct CacheKey {
  KeyKind kind = KeyKind::kRequest;
  uint64_t id = 0;
  uint64_t model_id = 0;

  bool operator==(const CacheKey &other) const {
    return std::tie(kind, id, model_id) == std::tie(other.kind, other.id, other.model_id);
  }
  bool operator<(const CacheKey &other) const {
    return std::tie(kind, id, model_id) < std::tie(other.kind, other.id, other.model_id);
  }
};
std::string Text(const CacheKey &key);

// keys[i] is bound to row i, nothing where it is empty; a blocks cache has at most one.
using RowKeys = std::vector<std::optional<CacheKey>>;

struct CacheRef {
  enum class By : uint8_t { kId = 1, kKey = 2, kAddress = 3 };

  static CacheRef Id(int64_t cache_id) { return {By::kId, cache_id, {}, 0, 0}; }
  static CacheRef Key(const CacheKey &key) { return {By::kKey, 0, key, 0, 0}; }
  static CacheRef Address(uint64_t address, uint64_t length) { return {By::kAddress, 0, {}, address, length}; }

  By by = By::kId;
  int64_t cache_id = 0;
  CacheKey key;
  uint64_t address = 0;
  uint64_t length = 0;
};
std::string Text(const CacheRef &ref);

}  // namespace datadist

#endif  // DATADIST_CACHE_CACHE_KEY_H_
