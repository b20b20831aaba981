// How a name becomes a pinned cache.
#include <string>
#include <utility>

#include "cache/cache_registry.h"

namespace datadist {
namespace {

using llm_datadist::LLM_KV_CACHE_NOT_EXIST;

}  // namespace

Result<CachePin> CacheRegistry::Pin(int64_t cache_id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return PinByIdLocked(cache_id);
}

Result<CachePin> CacheRegistry::PinByIdLocked(int64_t cache_id) {
  if (IdDroppedLocked(cache_id)) {
    return Status(LLM_KV_CACHE_NOT_EXIST,
                  "cache " + std::to_string(cache_id) + " was deallocated: only its keys name it");
  }
  return regions_->Pin(cache_id);
}

Result<NamedCache> CacheRegistry::Find(const CacheRef &ref) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Result<NamedCache> found = FindLocked(ref);
  if (!found.ok()) {
    return found;
  }
  NamedCache &named = found.value();
  const RegisteredCache &cache = named.pin.cache();
  if (!two_sided_ && !cache.remote_accessible()) {
    return Invalid(Text(ref) + ": cache " + std::to_string(cache.id()) + " is not remote accessible");
  }
  // An allocated cache can lose each of its names alone, a key can be removed, and a blocks key goes to the cache
  // registered with it last.
  named.lasting = !cache.owned() && ref.by != CacheRef::By::kKey;
  return found;
}

Result<NamedCache> CacheRegistry::FindLocked(const CacheRef &ref) {
  switch (ref.by) {
    case CacheRef::By::kId: {
      Result<CachePin> pin = PinByIdLocked(ref.cache_id);
      return pin.ok() ? Result(NamedCache{std::move(pin).value(), {}, 0, 0, false}) : pin.status();
    }
    case CacheRef::By::kKey:
      return FindByKeyLocked(ref.key);
    case CacheRef::By::kAddress:
      return FindByAddressLocked(ref.address, ref.length);
  }
  return Invalid(Text(ref) + ", allowed: cache id, key, address");
}

Result<NamedCache> CacheRegistry::FindByKeyLocked(const CacheKey &key) {
  const auto binding = keys_.find(key);
  if (binding == keys_.end()) {
    return Status(LLM_KV_CACHE_NOT_EXIST, Text(key) + " names no cache");
  }
  Result<CachePin> pin = regions_->Pin(binding->second.cache_id);
  if (!pin.ok()) {
    return pin.status();
  }
  const auto row = key.kind == KeyKind::kBlocks ? std::nullopt : std::optional<uint32_t>(binding->second.row);
  return NamedCache{std::move(pin).value(), row, 0, 0, false};
}

Result<NamedCache> CacheRegistry::FindByAddressLocked(uint64_t address, uint64_t length) {
  Result<RegionTable::Location> found = regions_->Locate(address, length);
  if (!found.ok()) {
    return found.status();
  }
  RegionTable::Location &at = found.value();
  const int64_t cache_id = at.pin.cache().id();
  if (IdDroppedLocked(cache_id)) {
    return Invalid(std::to_string(length) + " bytes at address " + std::to_string(address) + " lie in cache " +
                   std::to_string(cache_id) + ", which was deallocated: only its keys name it");
  }
  return NamedCache{std::move(at.pin), {}, at.tensor, at.offset, false};
}

bool CacheRegistry::IdDroppedLocked(int64_t cache_id) const {
  const auto owned = owned_.find(cache_id);
  return owned != owned_.end() && owned->second.id_dropped;
}

}  // namespace datadist
