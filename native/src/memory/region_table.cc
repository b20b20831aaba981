#include "memory/region_table.h"

#include <array>
#include <condition_variable>
#include <string>
#include <utility>

#include "base/checked.h"
#include "base/fence.h"

namespace datadist {
namespace {

using llm_datadist::CachePlacement;

constexpr size_t kStampsPerChunk = 64;

Status Invalid(std::string text) { return Status(llm_datadist::LLM_PARAM_INVALID, std::move(text)); }

Status CheckAddrs(const llm_datadist::CacheDesc &desc, const std::vector<uint64_t> &addrs) {
  if (addrs.empty()) {
    return Invalid("addrs is empty: one address per tensor is needed");
  }
  if (addrs.size() != desc.num_tensors) {
    return Invalid("addrs has " + std::to_string(addrs.size()) + " entries, cache_desc.num_tensors is " +
                   std::to_string(desc.num_tensors) + ": they must be equal");
  }
  for (size_t i = 0; i < addrs.size(); ++i) {
    if (addrs[i] == 0) {
      return Invalid("addrs[" + std::to_string(i) + "] is 0");
    }
  }
  return Status::Ok();
}

// Total bytes of the cache; every tensor must lie in the address space, so that no later sum can wrap.
Result<uint64_t> CheckExtent(const CacheGeometry &geometry, const std::vector<uint64_t> &addrs) {
  for (size_t i = 0; i < addrs.size(); ++i) {
    if (!CheckedAdd(addrs[i], geometry.tensor_bytes)) {
      return Invalid("addrs[" + std::to_string(i) + "] = " + std::to_string(addrs[i]) + ": a tensor of " +
                     std::to_string(geometry.tensor_bytes) + " bytes there exceeds the address space");
    }
  }
  const auto total = CheckedMul(geometry.tensor_bytes, addrs.size());
  if (!total) {
    return Invalid("cache_desc: the size of all tensors exceeds 64 bits");
  }
  return *total;
}

}  // namespace

struct RegionTable::State {
  // Registered bytes of one placement. Values other than 0 and 1 are not refused by the API; they count as device.
  struct Account {
    uint64_t used = 0;
    uint64_t limit = 0;
  };
  Account &AccountOf(CachePlacement placement) { return placement == CachePlacement::kHost ? host : device; }

  CacheStamp *TakeStamp() {
    if (free_stamps.empty()) {
      chunks.push_back(std::make_unique<std::array<CacheStamp, kStampsPerChunk>>());
      for (CacheStamp &stamp : *chunks.back()) {
        free_stamps.push_back(&stamp);
      }
    }
    CacheStamp *stamp = free_stamps.back();
    free_stamps.pop_back();
    return stamp;
  }

  uint32_t max_addrs_per_cache = 0;
  Account device;
  Account host;
  int64_t last_id = 0;
  uint64_t last_generation = 0;
  std::map<int64_t, std::shared_ptr<RegisteredCache>> caches;  // a closing one stays until its last pin is gone
  std::vector<std::unique_ptr<std::array<CacheStamp, kStampsPerChunk>>> chunks;
  std::vector<CacheStamp *> free_stamps;
  std::condition_variable unpinned;  // a closing cache lost its last pin, or is gone
};

// ---- CachePin ----

CachePin::CachePin(std::shared_ptr<RegionTable> table, std::shared_ptr<RegisteredCache> cache)
    : table_(std::move(table)), cache_(std::move(cache)) {}

CachePin::CachePin(CachePin &&other) noexcept : table_(std::move(other.table_)), cache_(std::move(other.cache_)) {}

CachePin &CachePin::operator=(CachePin &&other) noexcept {
  if (this != &other) {
    Release();
    table_ = std::move(other.table_);
    cache_ = std::move(other.cache_);
  }
  return *this;
}

CachePin::~CachePin() { Release(); }

void CachePin::Release() {
  if (cache_ == nullptr) {
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(table_->mutex_);
    if (--cache_->pins_ == 0 && cache_->closing_) {
      table_->state_->unpinned.notify_all();
    }
  }
  cache_.reset();
  table_.reset();
}

Result<std::byte *> CachePin::Resolve(uint64_t tensor, uint64_t offset, uint64_t length) const {
  const CacheGeometry &geometry = cache_->geometry_;
  if (tensor >= cache_->addrs_.size()) {
    return Invalid("tensor " + std::to_string(tensor) + " of cache " + std::to_string(cache_->id_) + ": it has " +
                   std::to_string(cache_->addrs_.size()));
  }
  if (!RangeFits(offset, length, geometry.tensor_bytes)) {
    return Invalid("bytes at " + std::to_string(offset) + ", length " + std::to_string(length) + ", of cache " +
                   std::to_string(cache_->id_) + ": its tensors have " + std::to_string(geometry.tensor_bytes) +
                   " bytes");
  }
  return reinterpret_cast<std::byte *>(static_cast<uintptr_t>(cache_->addrs_[tensor] + offset));
}

// ---- RegionTable ----

std::shared_ptr<RegionTable> RegionTable::Create(RegionLimits limits) {
  struct Creatable : RegionTable {
    explicit Creatable(RegionLimits given) : RegionTable(given) {}
  };
  return std::make_shared<Creatable>(limits);
}

RegionTable::RegionTable(RegionLimits limits) : state_(std::make_unique<State>()) {
  state_->max_addrs_per_cache = limits.max_addrs_per_cache;
  state_->device.limit = limits.max_device_bytes;
  state_->host.limit = limits.max_host_bytes;
}

RegionTable::~RegionTable() = default;

Result<int64_t> RegionTable::Register(const llm_datadist::CacheDesc &desc, const std::vector<uint64_t> &addrs) {
  if (Status status = CheckAddrs(desc, addrs); !status.ok()) {
    return status;
  }
  Result<CacheGeometry> geometry = ComputeGeometry(desc);
  if (!geometry.ok()) {
    return geometry.status();
  }
  const Result<uint64_t> bytes = CheckExtent(geometry.value(), addrs);
  if (!bytes.ok()) {
    return bytes.status();
  }

  const std::lock_guard<std::mutex> lock(mutex_);
  if (addrs.size() > state_->max_addrs_per_cache) {
    return Invalid("addrs has " + std::to_string(addrs.size()) + " entries: at most " +
                   std::to_string(state_->max_addrs_per_cache) + " per cache are allowed");
  }
  State::Account &account = state_->AccountOf(desc.placement);
  if (!RangeFits(account.used, bytes.value(), account.limit)) {
    return Invalid("cache of " + std::to_string(bytes.value()) + " bytes: " + std::to_string(account.used) + " of " +
                   std::to_string(account.limit) + " allowed " +
                   (&account == &state_->host ? "host" : "device") + " bytes are registered already");
  }
  auto cache = std::make_shared<RegisteredCache>();
  cache->id_ = ++state_->last_id;
  cache->generation_ = ++state_->last_generation;
  cache->geometry_ = geometry.value();
  cache->addrs_ = addrs;
  cache->stamp_ = state_->TakeStamp();
  state_->caches.emplace(cache->id_, cache);
  account.used += bytes.value();
  cache->stamp_->generation.store(cache->generation_);
  return cache->id_;
}

void RegionTable::Unregister(int64_t cache_id) {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto found = state_->caches.find(cache_id);
  if (found == state_->caches.end()) {
    return;
  }
  const std::shared_ptr<RegisteredCache> cache = found->second;
  if (cache->closing_) {  // another thread is at it; this call too may return only when nothing touches the memory
    state_->unpinned.wait(lock, [this, cache_id] { return state_->caches.count(cache_id) == 0; });
    return;
  }
  cache->closing_ = true;
  // Before the owner may touch the memory again: a peer that reads the stamp after its bytes must see this.
  cache->stamp_->generation.store(0);
  FullFence();
  state_->unpinned.wait(lock, [&cache] { return cache->pins_ == 0; });
  state_->AccountOf(cache->geometry_.placement).used -= cache->geometry_.tensor_bytes * cache->addrs_.size();
  state_->free_stamps.push_back(cache->stamp_);
  state_->caches.erase(cache_id);
  state_->unpinned.notify_all();
}

void RegionTable::UnregisterAll() {
  while (true) {
    int64_t any_id = 0;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (state_->caches.empty()) {
        return;
      }
      any_id = state_->caches.begin()->first;
    }
    Unregister(any_id);
  }
}

Result<CachePin> RegionTable::Pin(int64_t cache_id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = state_->caches.find(cache_id);
  if (found == state_->caches.end() || found->second->closing_) {
    return Status(llm_datadist::LLM_KV_CACHE_NOT_EXIST,
                  "cache " + std::to_string(cache_id) + " is not registered");
  }
  ++found->second->pins_;
  return CachePin(shared_from_this(), found->second);
}

}  // namespace datadist
