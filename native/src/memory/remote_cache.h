// What the ends of a link tell one another of their memory, and how a transfer names bytes of it.
#ifndef DATADIST_MEMORY_REMOTE_CACHE_H_
#define DATADIST_MEMORY_REMOTE_CACHE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "memory/region_table.h"
#include "memory/spans.h"

namespace datadist {

// What a transport of one end has to say to the same transport of the other. Nobody between them looks into it.
using Blob = std::vector<uint8_t>;

constexpr size_t kMaxTransports = 8;
constexpr size_t kMaxTransportName = 31;
constexpr size_t kMaxOfferBlob = 256;
constexpr uint16_t kMaxDataConnections = 16;  // of a link, each way
// An address of each tensor of the largest cache, and some more.
constexpr size_t kMaxCacheBlob = sizeof(uint64_t) * kMaxTensorsPerCache + 256;

// A way in which an end can move bytes.
struct TransportOffer {
  std::string name;  // lower-case letters, digits and '_'
  Blob blob;
};

// What the owner told of one of its caches.
struct RemoteCache {
  int64_t cache_id = 0;
  uint64_t generation = 0;
  CacheGeometry geometry;
  Blob blob;
};

}  // namespace datadist

#endif  // DATADIST_MEMORY_REMOTE_CACHE_H_
