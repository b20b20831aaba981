// The caches of one endpoint by the names that the API gives them: ids and keys; and the memory of those that were
// allocated here.
//
//   registered cache   the caller's memory: lives until Unregister; its keys are never consumed, but may be removed
//   allocated cache    pool memory, counted by references: its id, and each key bound to it. Deallocate drops the id,
//                      and the key of a blocks cache; RemoveKey and Consume drop a key; the last one frees the memory,
//                      once no transfer uses it any more
//
// A cache whose id was dropped can still be pulled by its remaining keys, and by nothing else.
//
// Threads: every member may be called from any thread; none waits for a transfer but Unregister.
#ifndef DATADIST_CACHE_CACHE_REGISTRY_H_
#define DATADIST_CACHE_CACHE_REGISTRY_H_

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "base/status.h"
#include "cache/cache_key.h"
#include "cache/memory_pool.h"
#include "memory/region_table.h"

namespace datadist {

// A cache that a peer named, pinned.
struct NamedCache {
  CachePin pin;
  std::optional<uint32_t> row;  // of a request or prefix key
  uint32_t tensor = 0;          // of an address
  uint64_t offset = 0;          // of an address, inside that tensor
  // Whether the same name means the same cache for as long as that is registered, so that a peer need not ask again.
  bool lasting = false;
};

class CacheRegistry {
 public:
  struct Pools {
    std::shared_ptr<MemoryPool> device;  // empty: none
    std::shared_ptr<MemoryPool> host;
    // What the first allocation makes where there is none: programs that never allocate reserve no addresses.
    std::optional<PoolConfig> default_device{};
    std::optional<PoolConfig> default_host{};
  };
  // two_sided: peers may name every cache, and a pull by a request key consumes it. Otherwise only remote accessible
  // caches can be named (LLM_PARAM_INVALID) and nothing is ever consumed.
  CacheRegistry(std::shared_ptr<RegionTable> regions, Pools pools, bool two_sided);
  ~CacheRegistry();
  CacheRegistry(const CacheRegistry &) = delete;
  CacheRegistry &operator=(const CacheRegistry &) = delete;

  Result<int64_t> Register(const llm_datadist::CacheDesc &desc, const std::vector<uint64_t> &addrs,
                           const Registration &registration, const RowKeys &keys);
  // An allocated cache is not touched. Otherwise as RegionTable::Unregister.
  void Unregister(int64_t cache_id);

  struct Allocation {
    int64_t cache_id = 0;
    std::vector<uint64_t> addrs;
  };
  // LLM_FEATURE_NOT_ENABLED: no pool at all. LLM_PARAM_INVALID: no pool of the placement, more keys than rows, a key
  // twice or bound already. LLM_OUT_OF_MEMORY.
  Result<Allocation> Allocate(const llm_datadist::CacheDesc &desc, CacheLayout layout, const RowKeys &keys);
  // Unknown id, registered cache: Ok, nothing happens. LLM_FEATURE_NOT_ENABLED without any pool.
  Status Deallocate(int64_t cache_id);
  // Peers no longer find the row by it. Unknown key: Ok, nothing happens.
  Status RemoveKey(const CacheKey &key);

  // A cache of ours by its id. LLM_KV_CACHE_NOT_EXIST also when the id was dropped and only keys are left.
  Result<CachePin> Pin(int64_t cache_id);

  // What a peer named. LLM_KV_CACHE_NOT_EXIST; LLM_PARAM_INVALID: not remote accessible, or no cache at that address.
  Result<NamedCache> Find(const CacheRef &ref);

  // A peer pulled tensors [first, +count) of that generation of the cache by `key`. Once every tensor was, the key's
  // reference is dropped. LLM_KV_CACHE_NOT_EXIST when another peer was faster, so that exactly one pull by a key
  // succeeds. Ok and without effect for keys that are not consumed: prefix and blocks keys, those of registered caches,
  // all when not two-sided.
  Status Consume(const CacheKey &key, uint64_t generation, uint32_t first_tensor, uint32_t count);

  // Drops every key and cache; waits for pins. Not beside Register or Allocate.
  void Clear();

 private:
  struct Binding {
    int64_t cache_id = 0;
    uint64_t generation = 0;
    uint32_t row = 0;
    std::vector<bool> pulled;  // by tensor; of an allocated cache
  };
  // Pool memory of one cache; freed with the last holder, so that it outlives every pin.
  struct OwnedMemory;
  using Memory = std::shared_ptr<const OwnedMemory>;
  struct OwnedCache {
    CacheLayout layout = CacheLayout::kContiguous;
    uint64_t references = 0;  // the id, if not dropped, and the keys
    bool id_dropped = false;
    Memory memory;
  };
  // Caches that lost their last reference. Declared before the lock and so destroyed after it: giving memory back to
  // the kernel takes time, in which peers may go on.
  using Garbage = std::vector<Memory>;

  Result<std::shared_ptr<MemoryPool>> PoolLocked(bool host);
  Result<Memory> AllocateLocked(const CacheGeometry &geometry);
  Result<CachePin> PinByIdLocked(int64_t cache_id);
  Result<NamedCache> FindLocked(const CacheRef &ref);
  Result<NamedCache> FindByKeyLocked(const CacheKey &key);
  Result<NamedCache> FindByAddressLocked(uint64_t address, uint64_t length);
  bool IdDroppedLocked(int64_t cache_id) const;

  Status CheckUnboundLocked(const RowKeys &keys) const;
  // A request or prefix key that is bound already stays as it is; a blocks key is taken from the cache that has it.
  Status BindLocked(int64_t cache_id, const RowKeys &keys, Garbage &garbage);
  void UnbindLocked(std::map<CacheKey, Binding>::iterator binding, Garbage &garbage);
  void UnbindAllLocked(int64_t cache_id, Garbage &garbage);
  void DropReferenceLocked(int64_t cache_id, Garbage &garbage);
  void ReleaseLocked(int64_t cache_id, Memory memory, Garbage &garbage);
  void ReleaseAll();

  const std::shared_ptr<RegionTable> regions_;
  const bool has_pool_;
  const bool two_sided_;
  // Taken before the region table's, never the other way round.
  std::mutex mutex_;
  Pools pools_;                          // guarded by mutex_
  std::map<CacheKey, Binding> keys_;     // guarded by mutex_
  std::map<int64_t, OwnedCache> owned_;  // guarded by mutex_
};

}  // namespace datadist

#endif  // DATADIST_CACHE_CACHE_REGISTRY_H_
