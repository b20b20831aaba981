// Registered caches of one endpoint, and the one place that turns (cache, tensor, offset, length) into an address.
//
//   RegisterKvCache ──> RegionTable ── Pin(cache id) ──> CachePin ── Resolve(tensor, offset, length) ──> bytes
//                          │
//                          └── one CacheStamp per cache, readable by peers on this host
//
// Lifecycle of a cache: registered -> pinned and unpinned any number of times -> Unregister: new pins are refused at
// once and its stamp is invalidated -> the last pin goes -> gone: from then on no transfer of this process touches the
// memory.
//
// A reader in another process (cma) takes no pin here. It reads the stamp after the bytes: the generation that it was
// told means that the cache was registered all the while, because generations are never used twice; anything else
// means the bytes are not to be trusted and the transfer fails with LLM_KV_CACHE_NOT_EXIST. Nobody writes from another
// process: a late write could not be undone.
//
// Threads: every member may be called from any thread.
#ifndef DATADIST_MEMORY_REGION_TABLE_H_
#define DATADIST_MEMORY_REGION_TABLE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "base/deadline.h"
#include "base/status.h"
#include "llm_datadist/llm_datadist_ext.h"
#include "memory/spans.h"
#include "memory/write_grants.h"

namespace datadist {

// What dimension 0 of the shape counts: both at the caller's choice (C++), batch rows, or blocks (Python).
enum class CacheLayout : uint8_t { kMix = 0, kContiguous = 1, kBlocks = 2 };

// Shape of a cache in bytes. `stride` = tensor_bytes / shape[0]: one block, or one batch row, of one tensor. A
// contiguous cache has no blocks; a blocks cache is one batch row.
struct CacheGeometry {
  llm_datadist::CachePlacement placement = llm_datadist::CachePlacement::kDevice;
  CacheLayout layout = CacheLayout::kMix;
  uint32_t num_tensors = 0;
  uint64_t batch_size = 0;
  uint64_t num_blocks = 0;
  uint64_t tensor_bytes = 0;
  uint64_t stride = 0;
  bool tensors_overlap = false;  // some byte belongs to two tensors, so that the order of writes to it matters
};

// Checks a description (spec 2.4.6: shape, dtype, overflow) and computes its geometry; LLM_PARAM_INVALID otherwise.
Result<CacheGeometry> ComputeGeometry(const llm_datadist::CacheDesc &desc, CacheLayout layout = CacheLayout::kMix);

// Whether two of `length` bytes each at `starts` share a byte.
bool ExtentsOverlap(std::vector<uint64_t> starts, uint64_t length);

// Lives in memory that stays mapped until the table dies, so that a peer may read it at any time. generation counts from
// a random number of 64 bits, one per registration; 0 when no cache uses the slot.
struct alignas(64) CacheStamp {
  std::atomic<uint64_t> generation{0};
};

// A cache's description, 8 bytes per address, must fit into one control frame of 1 MiB.
constexpr uint32_t kMaxTensorsPerCache = 65536;

using llm_datadist::CacheRights;
using llm_datadist::PeerAccess;
using llm_datadist::WritableBlocks;
// What a peer is about to do with a cache. A digest of what it may write tells it whether that arrived.
enum class PeerUse : uint8_t { kDescribe, kRead, kDigest, kWrite };
struct PeerRequest {
  uint64_t cluster_id = 0;
  PeerUse use = PeerUse::kRead;
  // Which bytes, where a grant may have to say that they are the peer's.
  TensorRange tensors = {};
  SpanList spans = {};
};

struct RegionLimits {
  PeerAccess peer_access = PeerAccess::kReadWrite;
  uint32_t max_addrs_per_cache = 240;            // of a cache whose memory is the caller's
  uint64_t max_registered_addrs = UINT64_MAX;  // over all caches whose memory is the caller's
  uint64_t max_device_bytes = 50ULL << 30;
  uint64_t max_host_bytes = 20ULL << 30;
};

struct Registration {
  CacheLayout layout = CacheLayout::kMix;
  bool remote_accessible = true;  // whether a peer may name it when remote access is on
  bool owned = false;             // its memory came from a pool of ours
  CacheRights rights = {};
};

class RegionTable;

// One registered cache. Immutable but for its pin count.
class RegisteredCache {
 public:
  int64_t id() const { return id_; }
  uint64_t generation() const { return generation_; }
  const CacheGeometry &geometry() const { return geometry_; }
  bool remote_accessible() const { return registration_.remote_accessible; }
  bool owned() const { return registration_.owned; }
  const CacheRights &rights() const { return registration_.rights; }
  const std::vector<uint64_t> &addrs() const { return addrs_; }  // for cma peers; to dereference, use CachePin
  const CacheStamp *stamp() const { return stamp_; }

 private:
  friend class RegionTable;
  friend class CachePin;
  int64_t id_ = 0;
  uint64_t generation_ = 0;
  CacheGeometry geometry_;
  Registration registration_;
  std::vector<uint64_t> addrs_;
  CacheStamp *stamp_ = nullptr;
  uint64_t pins_ = 0;              // guarded by RegionTable::mutex_
  bool closing_ = false;           // guarded by RegionTable::mutex_
  std::function<void()> on_gone_;  // guarded by RegionTable::mutex_
};

// Keeps a cache registered while bytes move, and the grant under which a peer writes them in use. Move-only; keeps the
// table alive.
class CachePin {
 public:
  CachePin() = default;
  CachePin(CachePin &&other) noexcept;
  CachePin &operator=(CachePin &&other) noexcept;
  ~CachePin();

  explicit operator bool() const { return cache_ != nullptr; }
  const RegisteredCache &cache() const { return *cache_; }

  // The address of `length` bytes at `offset` of tensor `tensor`; LLM_PARAM_INVALID, naming the range, when any byte
  // would lie outside. Checked without overflow for every input.
  Result<std::byte *> Resolve(uint64_t tensor, uint64_t offset, uint64_t length) const;

 private:
  friend class RegionTable;
  CachePin(std::shared_ptr<RegionTable> table, std::shared_ptr<RegisteredCache> cache);
  void Release();
  std::shared_ptr<RegionTable> table_;
  std::shared_ptr<RegisteredCache> cache_;
  WriteGrants::Use grant_;  // of a peer that writes what it was granted, or asks for digests of it
};

class RegionTable : public std::enable_shared_from_this<RegionTable> {
 public:
  static std::shared_ptr<RegionTable> Create(RegionLimits limits);
  ~RegionTable();
  RegionTable(const RegionTable &) = delete;
  RegionTable &operator=(const RegionTable &) = delete;

  const RegionLimits &limits() const { return limits_; }

  // Checks in the order of spec 2.4.6, then the limits. Ids count from 1.
  Result<int64_t> Register(const llm_datadist::CacheDesc &desc, const std::vector<uint64_t> &addrs,
                           const Registration &registration = {});

  // Unknown id: nothing to do. Waits for pins; every holder of a pin has a deadline, which bounds the wait.
  void Unregister(int64_t cache_id);
  void UnregisterAll();
  // Refuses new pins at once and returns; `on_gone` runs when the last pin is gone, here or on that pin's thread,
  // without any lock of the table, and is destroyed after that. Unknown id, or one that is being unregistered: nothing
  // happens.
  void UnregisterLater(int64_t cache_id, std::function<void()> on_gone);

  // LLM_KV_CACHE_NOT_EXIST for an id that is unknown or being unregistered.
  Result<CachePin> Pin(int64_t cache_id);

  // ---- peers, in peer_requests.cc ----
  // For a peer's transfer that means exactly that registration. Also LLM_PARAM_INVALID where peers may not do that.
  Result<CachePin> PinForPeer(int64_t cache_id, uint64_t generation, const PeerRequest &request);

  // LLM_PARAM_INVALID, with what says so, where peers may not do that with any cache, or that peer with this one. Ok
  // may still mean: with what it was granted.
  Status CheckPeerUse(PeerUse use) const;
  Status CheckPeerRequest(const RegisteredCache &cache, const PeerRequest &request) const;
  bool PeersMayRead(const RegisteredCache &cache) const;

  // The id of the grant. LLM_KV_CACHE_NOT_EXIST; LLM_PARAM_INVALID for no blocks, for those that a cache does not have,
  // and for a cache that is not written by grant, because the grant would say nothing.
  Result<uint64_t> GrantWrites(uint64_t cluster_id, const std::vector<WritableBlocks> &blocks);
  Status RevokeWrites(uint64_t grant_id) { return grants_.Revoke(grant_id); }

  // Where [address, +length) lies: the lowest cache id with a tensor that holds all of it. LLM_PARAM_INVALID when there
  // is none, and for no bytes, which lie nowhere.
  struct Location {
    CachePin pin;
    uint32_t tensor = 0;
    uint64_t offset = 0;
  };
  Result<Location> Locate(uint64_t address, uint64_t length);

 private:
  friend class CachePin;
  explicit RegionTable(RegionLimits limits);

  Status CheckLimitsLocked(const CacheGeometry &geometry, const Registration &registration, uint64_t bytes) const;
  void Unpin(RegisteredCache &cache);
  void EraseLocked(const RegisteredCache &cache);

  Result<WriteGrants::Area> AreaOf(uint64_t cluster_id, const WritableBlocks &blocks);
  bool NeedsGrant(const RegisteredCache &cache, PeerUse use) const;

  const RegionLimits limits_;
  WriteGrants grants_;
  struct State;  // stamps' memory, caches by id, totals, condition variable for caches that are gone
  std::mutex mutex_;
  std::unique_ptr<State> state_;
};

}  // namespace datadist

#endif  // DATADIST_MEMORY_REGION_TABLE_H_
