// Between which caches a call moves bytes; which bytes, see moves.h.
#ifndef DATADIST_TRANSFER_TARGETS_H_
#define DATADIST_TRANSFER_TARGETS_H_

#include <chrono>
#include <cstdint>
#include <optional>
#include <vector>

#include "cache/cache_key.h"
#include "transfer/plan.h"

namespace datadist {

// Of a Pull: where the bytes come from and which tensors. `src_row` is for a cache named by id: a key says its own.
struct PullTarget {
  uint64_t src_cluster_id = 0;
  CacheRef src;
  uint32_t src_row = 0;
  int64_t dst_cache_id = 0;
  LayerChoice layers;
  std::optional<std::chrono::milliseconds> time_left = std::nullopt;  // if that is less than the option says
};

// Of a Push: `layers` from src_layer on to those from dst_layer on. Bare addresses are those of one layer, and `dst_layer`
// has no meaning there.
struct PushTarget {
  int64_t src_cache_id = 0;
  int64_t src_layer = 0;
  uint64_t dst_cluster_id = 0;
  int64_t dst_layer = 0;
  uint32_t tensors_per_layer = 2;
  int64_t layers = 1;
  std::optional<std::chrono::milliseconds> time_left = std::nullopt;  // if that is less than the option says
};

// Of rows within this process.
struct RowCopy {
  int64_t dst_cache_id = 0;
  int64_t src_cache_id = 0;
  uint32_t dst_row = 0;
  uint32_t src_row = 0;
  uint64_t offset = 0;
  int64_t size = -1;
};

// A side of a copy within this process, which may be memory of the caller's that is not registered.
struct CopySide {
  int64_t cache_id = 0;  // above 0: that cache; otherwise the addresses, for whose size the caller answers
  std::vector<uint64_t> addrs;
};

}  // namespace datadist

#endif  // DATADIST_TRANSFER_TARGETS_H_
