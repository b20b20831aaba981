#include "memory/region_table.h"

#include <array>
#include <condition_variable>
#include <cstring>
#include <string>
#include <utility>

#include "base/checked.h"
#include "base/fence.h"
#include "base/random.h"
#include "llm_datadist/llm_datadist_ext.h"

namespace datadist {
namespace {

using llm_datadist::CachePlacement;

constexpr size_t kStampsPerChunk = 64;

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

std::string RaisedBy(const char *option) { return std::string(" (option ") + option + " raises it)"; }

}  // namespace

struct RegionTable::State {
  // Placements other than host and device are not refused by the API; they count as device.
  uint64_t &BytesOf(CachePlacement placement) {
    return placement == CachePlacement::kHost ? host_bytes : device_bytes;
  }

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

  // Totals of what is registered.
  uint64_t device_bytes = 0;
  uint64_t host_bytes = 0;
  uint64_t callers_addrs = 0;
  int64_t last_id = 0;
  uint64_t last_generation = 0;
  std::map<int64_t, std::shared_ptr<RegisteredCache>> caches;  // a closing one stays until its last pin is gone
  std::vector<std::unique_ptr<std::array<CacheStamp, kStampsPerChunk>>> chunks;
  std::vector<CacheStamp *> free_stamps;
  std::condition_variable gone;  // a cache left `caches`
};

// ---- CachePin ----

CachePin::CachePin(std::shared_ptr<RegionTable> table, std::shared_ptr<RegisteredCache> cache)
    : table_(std::move(table)), cache_(std::move(cache)) {}

CachePin::CachePin(CachePin &&other) noexcept
    : table_(std::move(other.table_)), cache_(std::move(other.cache_)), grant_(std::move(other.grant_)) {}

CachePin &CachePin::operator=(CachePin &&other) noexcept {
  if (this != &other) {
    Release();
    table_ = std::move(other.table_);
    cache_ = std::move(other.cache_);
    grant_ = std::move(other.grant_);
  }
  return *this;
}

CachePin::~CachePin() { Release(); }

void CachePin::Release() {
  if (cache_ == nullptr) {
    return;
  }
  grant_.reset();
  table_->Unpin(*cache_);
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

RegionTable::RegionTable(RegionLimits limits) : limits_(limits), state_(std::make_unique<State>()) {
  // A reader may find other bytes where a stamp was, of a table or a process that came later: no such bytes are to look
  // like one of our generations.
  if (const auto random = RandomBytes(); random.ok()) {
    std::memcpy(&state_->last_generation, random.value().data(), sizeof(state_->last_generation));
  }
}

RegionTable::~RegionTable() = default;

Status RegionTable::CheckLimitsLocked(const CacheGeometry &geometry, const Registration &registration,
                                      uint64_t bytes) const {
  if (!registration.owned && geometry.num_tensors > limits_.max_addrs_per_cache) {
    return Invalid("addrs has " + std::to_string(geometry.num_tensors) + " entries: at most " +
                   std::to_string(limits_.max_addrs_per_cache) + " per cache are allowed" +
                   RaisedBy(llm_datadist::OPTION_MAX_ADDRS_PER_CACHE));
  }
  if (!registration.owned &&
      !RangeFits(state_->callers_addrs, geometry.num_tensors, limits_.max_registered_addrs)) {
    return Invalid("addrs has " + std::to_string(geometry.num_tensors) + " entries: " +
                   std::to_string(state_->callers_addrs) + " of " + std::to_string(limits_.max_registered_addrs) +
                   " allowed addresses are registered already" + RaisedBy(llm_datadist::OPTION_MAX_REGISTERED_ADDRS));
  }
  const bool host = geometry.placement == CachePlacement::kHost;
  const uint64_t limit = host ? limits_.max_host_bytes : limits_.max_device_bytes;
  const uint64_t used = state_->BytesOf(geometry.placement);
  if (!RangeFits(used, bytes, limit)) {
    return Invalid(
        "cache of " + std::to_string(bytes) + " bytes: " + std::to_string(used) + " of " + std::to_string(limit) +
        " allowed " + (host ? "host" : "device") + " bytes are registered already" +
        RaisedBy(host ? llm_datadist::OPTION_MAX_HOST_BYTES : llm_datadist::OPTION_MAX_DEVICE_BYTES));
  }
  return Status::Ok();
}

Result<int64_t> RegionTable::Register(const llm_datadist::CacheDesc &desc, const std::vector<uint64_t> &addrs,
                                      const Registration &registration) {
  if (Status status = CheckAddrs(desc, addrs); !status.ok()) {
    return status;
  }
  Result<CacheGeometry> geometry = ComputeGeometry(desc, registration.layout);
  if (!geometry.ok()) {
    return geometry.status();
  }
  const Result<uint64_t> bytes = CheckExtent(geometry.value(), addrs);
  if (!bytes.ok()) {
    return bytes.status();
  }

  const std::lock_guard<std::mutex> lock(mutex_);
  if (Status status = CheckLimitsLocked(geometry.value(), registration, bytes.value()); !status.ok()) {
    return status;
  }
  auto cache = std::make_shared<RegisteredCache>();
  cache->id_ = ++state_->last_id;
  if (++state_->last_generation == 0) {
    ++state_->last_generation;  // 0 is no cache's
  }
  cache->generation_ = state_->last_generation;
  cache->geometry_ = geometry.value();
  cache->geometry_.tensors_overlap = ExtentsOverlap(addrs, geometry.value().tensor_bytes);
  cache->registration_ = registration;
  cache->addrs_ = addrs;
  cache->stamp_ = state_->TakeStamp();
  state_->caches.emplace(cache->id_, cache);
  state_->BytesOf(desc.placement) += bytes.value();
  state_->callers_addrs += registration.owned ? 0 : addrs.size();
  cache->stamp_->generation.store(cache->generation_);
  return cache->id_;
}

void RegionTable::Unregister(int64_t cache_id) {
  UnregisterLater(cache_id, nullptr);
  // Also where another thread began it: this call too may return only when nothing touches the memory.
  std::unique_lock<std::mutex> lock(mutex_);
  state_->gone.wait(lock, [this, cache_id] { return state_->caches.count(cache_id) == 0; });
}

void RegionTable::UnregisterLater(int64_t cache_id, std::function<void()> on_gone) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = state_->caches.find(cache_id);
    if (found == state_->caches.end() || found->second->closing_) {
      return;
    }
    RegisteredCache &cache = *found->second;
    cache.closing_ = true;
    // Before the owner may touch the memory again: a peer that reads the stamp after its bytes must see this.
    cache.stamp_->generation.store(0);
    FullFence();
    if (cache.pins_ != 0) {
      cache.on_gone_ = std::move(on_gone);
      return;
    }
    EraseLocked(cache);
  }
  if (on_gone) {
    on_gone();
  }
}

void RegionTable::Unpin(RegisteredCache &cache) {
  std::function<void()> on_gone;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--cache.pins_ != 0 || !cache.closing_) {
      return;
    }
    on_gone = std::move(cache.on_gone_);
    EraseLocked(cache);
  }
  if (on_gone) {
    on_gone();
  }
}

void RegionTable::EraseLocked(const RegisteredCache &cache) {
  state_->BytesOf(cache.geometry_.placement) -= cache.geometry_.tensor_bytes * cache.addrs_.size();
  state_->callers_addrs -= cache.registration_.owned ? 0 : cache.addrs_.size();
  state_->free_stamps.push_back(cache.stamp_);
  state_->caches.erase(int64_t{cache.id_});  // last: it may be what keeps `cache` alive
  state_->gone.notify_all();
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

Result<RegionTable::Location> RegionTable::Locate(uint64_t address, uint64_t length) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto &[id, cache] : state_->caches) {
    const uint32_t num_tensors = cache->closing_ || length == 0 ? 0 : cache->geometry_.num_tensors;
    for (uint32_t tensor = 0; tensor < num_tensors; ++tensor) {
      const uint64_t start = cache->addrs_[tensor];
      if (address >= start && RangeFits(address - start, length, cache->geometry_.tensor_bytes)) {
        ++cache->pins_;
        return Location{CachePin(shared_from_this(), cache), tensor, address - start};
      }
    }
  }
  return Invalid(std::to_string(length) + " bytes at address " + std::to_string(address) +
                 " do not lie in one tensor of a registered cache");
}

}  // namespace datadist
