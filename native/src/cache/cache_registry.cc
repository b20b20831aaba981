#include "cache/cache_registry.h"

#include <algorithm>
#include <set>
#include <string>
#include <utility>

#include "base/checked.h"

namespace datadist {
namespace {

Status NoPool() {
  return Status(llm_datadist::LLM_FEATURE_NOT_ENABLED,
                "no memory pool: set option llm.MemPoolConfig or llm.HostMemPoolConfig");
}

// Whether the keys can name rows, or the whole, of such a cache.
Status CheckKeys(const RowKeys &keys, const CacheGeometry &geometry) {
  if (keys.size() > geometry.batch_size) {
    return Invalid(std::to_string(keys.size()) + " cache keys: at most " + std::to_string(geometry.batch_size) +
                   " are allowed, one per row");
  }
  for (const auto &key : keys) {
    if (key.has_value() && (key->kind == KeyKind::kBlocks) != (geometry.layout == CacheLayout::kBlocks)) {
      return Invalid(Text(*key) + ": a blocks cache takes a blocks key, any other cache request and prefix keys");
    }
  }
  return Status::Ok();
}

}  // namespace

struct CacheRegistry::OwnedMemory {
  explicit OwnedMemory(std::shared_ptr<MemoryPool> from) : pool(std::move(from)) {}
  OwnedMemory(const OwnedMemory &) = delete;
  OwnedMemory &operator=(const OwnedMemory &) = delete;
  ~OwnedMemory() {
    for (const uint64_t address : addrs) {
      pool->Free(address);
    }
  }

  const std::shared_ptr<MemoryPool> pool;
  std::vector<uint64_t> addrs;  // one per tensor
};

CacheRegistry::CacheRegistry(std::shared_ptr<RegionTable> regions, Pools pools, bool two_sided)
    : regions_(std::move(regions)),
      has_pool_(pools.device != nullptr || pools.host != nullptr || pools.default_device || pools.default_host),
      two_sided_(two_sided),
      pools_(std::move(pools)) {}

CacheRegistry::~CacheRegistry() { ReleaseAll(); }

// ---- registered caches ----

Result<int64_t> CacheRegistry::Register(const llm_datadist::CacheDesc &desc, const std::vector<uint64_t> &addrs,
                                        const Registration &registration, const RowKeys &keys) {
  // Where it has no geometry, RegionTable says what is wrong.
  if (const auto geometry = ComputeGeometry(desc, registration.layout); geometry.ok()) {
    if (Status status = CheckKeys(keys, geometry.value()); !status.ok()) {
      return status;
    }
  }
  Garbage garbage;
  const std::lock_guard<std::mutex> lock(mutex_);
  const Result<int64_t> cache_id = regions_->Register(desc, addrs, registration);
  if (!cache_id.ok()) {
    return cache_id.status();
  }
  if (Status status = BindLocked(cache_id.value(), keys, garbage); !status.ok()) {
    return status;
  }
  return cache_id.value();
}

void CacheRegistry::Unregister(int64_t cache_id) {
  {
    Garbage garbage;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (owned_.count(cache_id) != 0) {
      return;
    }
    UnbindAllLocked(cache_id, garbage);
  }
  regions_->Unregister(cache_id);
}

// ---- allocated caches ----

Result<std::shared_ptr<MemoryPool>> CacheRegistry::PoolLocked(bool host) {
  std::shared_ptr<MemoryPool> &pool = host ? pools_.host : pools_.device;
  const std::optional<PoolConfig> &config = host ? pools_.default_host : pools_.default_device;
  if (pool == nullptr && !config.has_value()) {
    return Invalid(std::string("cache_desc.placement: no ") + (host ? "host" : "device") +
                   " memory pool, set option " + (host ? "llm.HostMemPoolConfig" : "llm.MemPoolConfig"));
  }
  if (pool == nullptr) {
    Result<std::shared_ptr<MemoryPool>> made = MemoryPool::Create(*config);
    if (!made.ok()) {
      return made;
    }
    pool = std::move(made).value();
  }
  return pool;
}

Result<CacheRegistry::Memory> CacheRegistry::AllocateLocked(const CacheGeometry &geometry) {
  const auto found = PoolLocked(geometry.placement == llm_datadist::CachePlacement::kHost);
  if (!found.ok()) {
    return found.status();
  }
  const std::shared_ptr<MemoryPool> &pool = found.value();
  if (geometry.num_tensors == 0 || geometry.num_tensors > kMaxTensorsPerCache) {
    return Invalid("cache_desc.num_tensors is " + std::to_string(geometry.num_tensors) + ", allowed: 1.." +
                   std::to_string(kMaxTensorsPerCache));
  }
  const auto memory = std::make_shared<OwnedMemory>(pool);
  for (uint32_t tensor = 0; tensor < geometry.num_tensors; ++tensor) {
    const Result<uint64_t> address = pool->Allocate(geometry.tensor_bytes);
    if (!address.ok()) {
      return Status(address.status().code(), "tensor " + std::to_string(tensor) + " of " +
                                                 std::to_string(geometry.num_tensors) + ": " +
                                                 address.status().text());
    }
    memory->addrs.push_back(address.value());
  }
  return Memory(memory);
}

Result<CacheRegistry::Allocation> CacheRegistry::Allocate(const llm_datadist::CacheDesc &desc, CacheLayout layout,
                                                          const RowKeys &keys) {
  if (!has_pool_) {
    return NoPool();
  }
  const Result<CacheGeometry> geometry = ComputeGeometry(desc, layout);
  if (!geometry.ok()) {
    return geometry.status();
  }
  if (Status status = CheckKeys(keys, geometry.value()); !status.ok()) {
    return status;
  }
  Garbage garbage;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (Status status = CheckUnboundLocked(keys); !status.ok()) {
    return status;
  }
  const Result<Memory> allocated = AllocateLocked(geometry.value());
  if (!allocated.ok()) {
    return allocated.status();
  }
  const Memory &memory = allocated.value();
  const Result<int64_t> cache_id = regions_->Register(desc, memory->addrs, {layout, true, true});
  if (!cache_id.ok()) {
    return cache_id.status();
  }
  owned_.emplace(cache_id.value(), OwnedCache{layout, 1, false, memory});
  if (Status status = BindLocked(cache_id.value(), keys, garbage); !status.ok()) {
    return status;
  }
  return Allocation{cache_id.value(), memory->addrs};
}

Status CacheRegistry::Deallocate(int64_t cache_id) {
  if (!has_pool_) {
    return NoPool();
  }
  Garbage garbage;
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto owned = owned_.find(cache_id);
  if (owned == owned_.end() || owned->second.id_dropped) {
    return Status::Ok();
  }
  owned->second.id_dropped = true;
  if (owned->second.layout == CacheLayout::kBlocks) {
    UnbindAllLocked(cache_id, garbage);
  }
  DropReferenceLocked(cache_id, garbage);
  return Status::Ok();
}

Status CacheRegistry::RemoveKey(const CacheKey &key) {
  Garbage garbage;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto binding = keys_.find(key); binding != keys_.end()) {
    UnbindLocked(binding, garbage);
  }
  return Status::Ok();
}

// ---- keys and references ----

Status CacheRegistry::Consume(const CacheKey &key, uint64_t generation, uint32_t first_tensor, uint32_t count) {
  if (!two_sided_ || key.kind != KeyKind::kRequest) {
    return Status::Ok();
  }
  Garbage garbage;
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = keys_.find(key);
  if (found == keys_.end() || found->second.generation != generation) {
    return Status(llm_datadist::LLM_KV_CACHE_NOT_EXIST,
                  Text(key) + " no longer names the cache that was pulled: another pull was faster, or it was removed");
  }
  Binding &binding = found->second;
  if (owned_.count(binding.cache_id) == 0) {
    return Status::Ok();
  }
  if (!RangeFits(first_tensor, count, binding.pulled.size())) {
    return Invalid(Text(key) + ": " + std::to_string(count) + " tensors from " + std::to_string(first_tensor) +
                   " were pulled, cache " + std::to_string(binding.cache_id) + " has " +
                   std::to_string(binding.pulled.size()));
  }
  std::fill_n(binding.pulled.begin() + first_tensor, count, true);
  if (std::find(binding.pulled.begin(), binding.pulled.end(), false) == binding.pulled.end()) {
    UnbindLocked(found, garbage);
  }
  return Status::Ok();
}

Status CacheRegistry::CheckUnboundLocked(const RowKeys &keys) const {
  std::set<CacheKey> seen;
  for (const auto &key : keys) {
    if (!key.has_value()) {
      continue;
    }
    if (!seen.insert(*key).second) {
      return Invalid(Text(*key) + " is given twice");
    }
    if (const auto bound = keys_.find(*key); bound != keys_.end()) {
      return Invalid(Text(*key) + " is bound already, to cache " + std::to_string(bound->second.cache_id));
    }
  }
  return Status::Ok();
}

Status CacheRegistry::BindLocked(int64_t cache_id, const RowKeys &keys, Garbage &garbage) {
  const Result<CachePin> pin = regions_->Pin(cache_id);
  if (!pin.ok()) {
    return pin.status();
  }
  const RegisteredCache &cache = pin.value().cache();
  const auto owned = owned_.find(cache_id);
  for (size_t row = 0; row < keys.size(); ++row) {
    if (!keys[row].has_value()) {
      continue;
    }
    if (const auto bound = keys_.find(*keys[row]); bound != keys_.end()) {
      if (bound->first.kind != KeyKind::kBlocks) {
        continue;
      }
      UnbindLocked(bound, garbage);
    }
    Binding binding{cache_id, cache.generation(), static_cast<uint32_t>(row), {}};
    if (owned != owned_.end()) {
      binding.pulled.resize(cache.geometry().num_tensors);
      ++owned->second.references;
    }
    keys_.emplace(*keys[row], std::move(binding));
  }
  return Status::Ok();
}

void CacheRegistry::UnbindLocked(std::map<CacheKey, Binding>::iterator binding, Garbage &garbage) {
  const int64_t cache_id = binding->second.cache_id;
  keys_.erase(binding);
  DropReferenceLocked(cache_id, garbage);
}

void CacheRegistry::UnbindAllLocked(int64_t cache_id, Garbage &garbage) {
  for (auto next = keys_.begin(); next != keys_.end();) {
    const auto binding = next++;
    if (binding->second.cache_id == cache_id) {
      UnbindLocked(binding, garbage);
    }
  }
}

void CacheRegistry::DropReferenceLocked(int64_t cache_id, Garbage &garbage) {
  const auto owned = owned_.find(cache_id);
  if (owned == owned_.end() || --owned->second.references != 0) {
    return;
  }
  ReleaseLocked(cache_id, std::move(owned->second.memory), garbage);
  owned_.erase(owned);
}

void CacheRegistry::ReleaseLocked(int64_t cache_id, Memory memory, Garbage &garbage) {
  garbage.push_back(memory);
  regions_->UnregisterLater(cache_id, [held = std::move(memory)] {});
}

void CacheRegistry::ReleaseAll() {
  Garbage garbage;
  const std::lock_guard<std::mutex> lock(mutex_);
  keys_.clear();
  for (auto &[cache_id, owned] : owned_) {
    ReleaseLocked(cache_id, std::move(owned.memory), garbage);
  }
  owned_.clear();
}

void CacheRegistry::Clear() {
  ReleaseAll();
  regions_->UnregisterAll();
}

}  // namespace datadist
