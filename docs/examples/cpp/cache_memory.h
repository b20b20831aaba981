// The memory of one cache, with guard bytes around every tensor, and what it should hold.
#ifndef LLM_DATADIST_EXAMPLE_CACHE_MEMORY_H_
#define LLM_DATADIST_EXAMPLE_CACHE_MEMORY_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "example.h"

namespace example {

constexpr uint32_t kTensors = 8;  // 4 layers, K and V of each
constexpr uint32_t kBlocks = 4;   // rows, when read as batches
constexpr size_t kBlockBytes = 16 * sizeof(int32_t);
constexpr size_t kGuardBytes = 64;
constexpr size_t kTensorBytes = kBlocks * kBlockBytes;

// What byte `offset` of a tensor holds when its owner has filled it: different for every owner, tensor and offset.
inline uint8_t FilledByte(uint64_t owner, size_t tensor, size_t offset) {
  const uint64_t mixed = (owner * 1'000'003 + tensor * 7'919 + offset + 1) * 0x9E3779B97F4A7C15U;
  return static_cast<uint8_t>(mixed >> 56);
}

class CacheMemory {
 public:
  explicit CacheMemory(uint64_t owner) : bytes_(kTensors * kPitch, kGuard), expected_(bytes_) {
    for (size_t tensor = 0; tensor < kTensors; ++tensor) {
      for (size_t block = 0; block < kBlocks; ++block) {
        Expect(tensor, block, owner, tensor, block);
      }
    }
    bytes_ = expected_;
  }

  std::vector<uint64_t> Addresses() {
    std::vector<uint64_t> addresses;
    for (size_t tensor = 0; tensor < kTensors; ++tensor) {
      addresses.push_back(reinterpret_cast<uint64_t>(bytes_.data() + Offset(tensor, 0)));
    }
    return addresses;
  }

  // From now on `block` of `tensor` should hold what `source_block` of `source_tensor` holds at its owner.
  void Expect(size_t tensor, size_t block, uint64_t source_owner, size_t source_tensor, size_t source_block,
              size_t length = kBlockBytes) {
    for (size_t i = 0; i < length; ++i) {
      expected_[Offset(tensor, block) + i] = FilledByte(source_owner, source_tensor, source_block * kBlockBytes + i);
    }
  }

  // All of it: what should have changed, what should not, and the guards.
  void Verify() const {
    const auto difference = std::mismatch(bytes_.begin(), bytes_.end(), expected_.begin());
    if (difference.first != bytes_.end()) {
      const auto at = static_cast<size_t>(difference.first - bytes_.begin());
      throw std::runtime_error("tensor " + std::to_string(at / kPitch) + ", byte " +
                               std::to_string(static_cast<int64_t>(at % kPitch) - static_cast<int64_t>(kGuardBytes)) +
                               " is " + std::to_string(*difference.first) + ", should be " +
                               std::to_string(*difference.second));
    }
    std::printf("memory: %zu bytes as expected\n", bytes_.size());
  }

 private:
  static constexpr uint8_t kGuard = 0xA5;
  static constexpr size_t kPitch = kGuardBytes + kTensorBytes + kGuardBytes;

  static size_t Offset(size_t tensor, size_t block) { return tensor * kPitch + kGuardBytes + block * kBlockBytes; }

  std::vector<uint8_t> bytes_;
  std::vector<uint8_t> expected_;
};

// Memory that peers can reach, for as long as the object lives.
class RegisteredCache {
 public:
  RegisteredCache(Endpoint &endpoint, CacheMemory &memory) : endpoint_(endpoint) {
    cache_.cache_desc.num_tensors = kTensors;
    cache_.cache_desc.data_type = llm_datadist::DT_INT32;
    cache_.cache_desc.shape = {kBlocks, kBlockBytes / sizeof(int32_t)};
    const std::vector<uint64_t> addresses = memory.Addresses();
    cache_.tensor_addrs.assign(addresses.begin(), addresses.end());
    Check(endpoint_->RegisterKvCache(cache_.cache_desc, addresses, {}, cache_.cache_id), "RegisterKvCache");
  }
  ~RegisteredCache() { endpoint_->UnregisterKvCache(cache_.cache_id); }
  RegisteredCache(const RegisteredCache &) = delete;
  RegisteredCache &operator=(const RegisteredCache &) = delete;

  const llm_datadist::Cache &cache() const { return cache_; }
  std::string IdText() const { return std::to_string(cache_.cache_id); }

 private:
  Endpoint &endpoint_;
  llm_datadist::Cache cache_;
};

}  // namespace example

#endif  // LLM_DATADIST_EXAMPLE_CACHE_MEMORY_H_
