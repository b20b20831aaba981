// What an owner tells of a cache for cma: u64 little-endian, first where its stamp lies, then where each tensor does.
// They are addresses of the owner's process and mean something to the kernel only.
#ifndef DATADIST_TRANSPORT_CMA_ADDRESSES_H_
#define DATADIST_TRANSPORT_CMA_ADDRESSES_H_

#include <endian.h>

#include <cstdint>
#include <cstring>

#include "base/bytes.h"
#include "memory/remote_cache.h"

namespace datadist {

inline Blob AddressesOf(const RegisteredCache &cache) {
  Writer writer;
  writer.Reserve(sizeof(uint64_t) * (1 + cache.addrs().size()));
  writer.U64(reinterpret_cast<uintptr_t>(&cache.stamp()->generation));
  for (const uint64_t addr : cache.addrs()) {
    writer.U64(addr);
  }
  return writer.Take();
}

// Read where they lie: to copy them would be the dearest part of a small transfer from a cache of many tensors.
class Addresses {
 public:
  // Of a cache that outlives it, and has passed AreWhole.
  explicit Addresses(const RemoteCache &cache) : bytes_(cache.blob.data()) {}

  // A stamp, and as many tensors as the geometry says.
  static bool AreWhole(const RemoteCache &cache) {
    return cache.blob.size() == sizeof(uint64_t) * (1 + uint64_t{cache.geometry.num_tensors}) &&
           Addresses(cache).stamp() != 0;
  }

  uint64_t stamp() const { return At(0); }
  uint64_t tensor(size_t index) const { return At(1 + index); }

 private:
  uint64_t At(size_t index) const {
    uint64_t address = 0;
    std::memcpy(&address, bytes_ + sizeof(address) * index, sizeof(address));
    return le64toh(address);
  }

  const uint8_t *bytes_;
};

}  // namespace datadist

#endif  // DATADIST_TRANSPORT_CMA_ADDRESSES_H_
