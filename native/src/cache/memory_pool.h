// Memory that caches are allocated from: one reserved range, handed out in multiples of its page size.
//
// Memory is committed by the kernel when it is first touched and given back when it is freed, so a pool costs what is
// used of it. Allocated memory starts as zeros: nobody sees the bytes of a cache that was there before.
//
// Threads: every member may be called from any thread.
#ifndef DATADIST_CACHE_MEMORY_POOL_H_
#define DATADIST_CACHE_MEMORY_POOL_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "base/status.h"

namespace datadist {

struct PoolConfig {
  uint64_t memory_size = 0;  // bytes, above 0
  uint32_t page_shift = 16;  // allocations are multiples of 2^page_shift bytes, aligned to as much
};

class MemoryPool {
 public:
  // LLM_OUT_OF_MEMORY when the range cannot be reserved.
  static Result<std::shared_ptr<MemoryPool>> Create(const PoolConfig &config);
  ~MemoryPool();
  MemoryPool(const MemoryPool &) = delete;
  MemoryPool &operator=(const MemoryPool &) = delete;

  // First fit. LLM_OUT_OF_MEMORY, naming what is wanted and what is left; LLM_PARAM_INVALID for 0 bytes.
  Result<uint64_t> Allocate(uint64_t bytes);
  // An address that came from Allocate and was not freed since; another one is ignored.
  void Free(uint64_t address);

  uint64_t used() const;  // bytes, whole pages

 private:
  MemoryPool(uint64_t base, uint64_t size, uint32_t page_shift);

  const uint64_t base_;
  const uint64_t size_;
  const uint32_t page_shift_;
  mutable std::mutex mutex_;
  std::map<uint64_t, uint64_t> free_;  // offset -> bytes, neighbours merged; guarded by mutex_
  std::map<uint64_t, uint64_t> used_;  // offset -> bytes; guarded by mutex_
};

}  // namespace datadist

#endif  // DATADIST_CACHE_MEMORY_POOL_H_
