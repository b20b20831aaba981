#include "cache/memory_pool.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <string>

#include "base/checked.h"

namespace datadist {
namespace {

using llm_datadist::LLM_OUT_OF_MEMORY;

uint64_t SystemPage() {
  static const auto size = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  return size;
}

uint64_t RoundUp(uint64_t value, uint64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
uint64_t RoundDown(uint64_t value, uint64_t multiple) { return value / multiple * multiple; }

void *Pointer(uint64_t address) { return reinterpret_cast<void *>(static_cast<uintptr_t>(address)); }

// Makes [begin, end) zeros and gives its whole system pages back. Touches nothing beside it.
void Discard(uint64_t begin, uint64_t end) {
  const uint64_t first = RoundUp(begin, SystemPage());
  const uint64_t last = RoundDown(end, SystemPage());
  // The kernel refuses locked memory (mlockall).
  if (first >= last || ::madvise(Pointer(first), last - first, MADV_DONTNEED) != 0) {
    std::memset(Pointer(begin), 0, end - begin);
    return;
  }
  std::memset(Pointer(begin), 0, first - begin);
  std::memset(Pointer(last), 0, end - last);
}

}  // namespace

Result<std::shared_ptr<MemoryPool>> MemoryPool::Create(const PoolConfig &config) {
  const uint64_t page = uint64_t{1} << config.page_shift;
  const uint64_t size = RoundDown(config.memory_size, page);
  const uint64_t alignment = std::max(page, SystemPage());
  const auto rounded = CheckedAdd(size, alignment - 1);
  const auto reserved = rounded ? CheckedAdd(RoundDown(*rounded, alignment), alignment) : std::nullopt;
  // Not counted as used by the kernel until it is touched.
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void *const memory = reserved ? ::mmap(nullptr, *reserved, PROT_READ | PROT_WRITE, kFlags, -1, 0) : MAP_FAILED;
  if (memory == MAP_FAILED) {
    const std::string reason = reserved ? std::strerror(errno) : "more than the address space";
    return Status(LLM_OUT_OF_MEMORY,
                  "a memory pool of " + std::to_string(config.memory_size) + " bytes cannot be reserved: " + reason);
  }
  const auto start = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(memory));
  const uint64_t base = RoundUp(start, alignment);
  if (base > start) {
    ::munmap(memory, base - start);
  }
  const uint64_t end = start + *reserved;
  const uint64_t used_end = base + RoundUp(size, SystemPage());
  if (used_end < end) {
    ::munmap(Pointer(used_end), end - used_end);
  }
  struct Creatable : MemoryPool {
    Creatable(uint64_t at, uint64_t bytes, uint32_t shift) : MemoryPool(at, bytes, shift) {}
  };
  return std::shared_ptr<MemoryPool>(std::make_shared<Creatable>(base, size, config.page_shift));
}

MemoryPool::MemoryPool(uint64_t base, uint64_t size, uint32_t page_shift)
    : base_(base), size_(size), page_shift_(page_shift) {
  if (size_ != 0) {
    free_.emplace(0, size_);
  }
}

MemoryPool::~MemoryPool() {
  if (size_ != 0) {
    ::munmap(Pointer(base_), RoundUp(size_, SystemPage()));
  }
}

Result<uint64_t> MemoryPool::Allocate(uint64_t bytes) {
  if (bytes == 0) {
    return Status(llm_datadist::LLM_PARAM_INVALID, "0 bytes cannot be allocated");
  }
  const uint64_t page = uint64_t{1} << page_shift_;
  const std::lock_guard<std::mutex> lock(mutex_);
  const uint64_t wanted = bytes <= size_ ? RoundUp(bytes, page) : UINT64_MAX;
  const auto fits = [wanted](const auto &run) { return run.second >= wanted; };
  const auto found = std::find_if(free_.begin(), free_.end(), fits);
  if (found == free_.end()) {
    uint64_t left = 0;
    uint64_t largest = 0;
    for (const auto &[offset, length] : free_) {
      left += length;
      largest = std::max(largest, length);
    }
    return Status(LLM_OUT_OF_MEMORY, "memory pool: " + std::to_string(bytes) + " bytes wanted in pages of " +
                                         std::to_string(page) + ", " + std::to_string(left) + " of " +
                                         std::to_string(size_) + " bytes are free, " + std::to_string(largest) +
                                         " in one piece");
  }
  const auto [offset, length] = *found;
  free_.erase(found);
  if (length > wanted) {
    free_.emplace(offset + wanted, length - wanted);
  }
  used_.emplace(offset, wanted);
  return base_ + offset;
}

void MemoryPool::Free(uint64_t address) {
  const uint64_t begin = address - base_;
  uint64_t end = begin;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto used = used_.find(begin);
    if (used == used_.end()) {
      return;
    }
    end += used->second;
  }
  // Still ours alone: giving much memory back takes time, in which others may allocate.
  Discard(address, base_ + end);

  const std::lock_guard<std::mutex> lock(mutex_);
  used_.erase(begin);
  uint64_t free_begin = begin;
  uint64_t free_end = end;
  auto next = free_.lower_bound(begin);
  if (next != free_.end() && next->first == end) {
    free_end += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second == begin) {
      free_begin = previous->first;
      free_.erase(previous);
    }
  }
  free_.emplace(free_begin, free_end - free_begin);
  // Pages of the system that were shared with a neighbour, which is free too by now.
  for (const uint64_t edge : {begin, end}) {
    const uint64_t page = RoundDown(edge, SystemPage());
    if (page != edge && page >= free_begin && page + SystemPage() <= free_end) {
      ::madvise(Pointer(base_ + page), SystemPage(), MADV_DONTNEED);
    }
  }
}

uint64_t MemoryPool::used() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  uint64_t total = 0;
  for (const auto &[offset, length] : used_) {
    total += length;
  }
  return total;
}

}  // namespace datadist
