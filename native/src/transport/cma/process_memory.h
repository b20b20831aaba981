// process_vm_readv over batches of (remote address, local bytes) pairs.
#ifndef DATADIST_TRANSPORT_CMA_PROCESS_MEMORY_H_
#define DATADIST_TRANSPORT_CMA_PROCESS_MEMORY_H_

#include <sys/types.h>
#include <sys/uio.h>

#include <cstddef>
#include <cstdint>

#include "base/iovecs.h"
#include "base/status.h"

namespace datadist {

// The pairs of one system call. Neighbours merge on each side by themselves: the two lists only have to be equally long
// in bytes, and fewer remote entries mean less page pinning. Lives on the stack, uninitialised beyond its counts: to
// allocate or clear 32 KiB would be the dearest part of a small transfer.
class IovecBatch {
 public:
  // Bounds one call to some ten milliseconds, so that deadlines are met.
  static constexpr uint64_t kMaxBytes = 64ULL << 20;

  // Whether there is no room for a pair of data; `RoomBytes` says how long the next may be. A full batch still takes
  // kSpareIovecs short pairs.
  bool Full() const {
    constexpr size_t kMaxData = kMaxIovecs - kSpareIovecs;
    return local_count_ >= kMaxData || remote_count_ >= kMaxData || bytes_ >= kMaxBytes;
  }
  bool Empty() const { return bytes_ == 0; }
  uint64_t RoomBytes() const { return kMaxBytes - bytes_; }
  void Add(uint64_t remote, void *local, uint64_t length);

  // Reads the whole batch, resuming where the kernel stopped short, and empties it. LLM_FAILED with the reason if the
  // process is gone, refuses, or has no such memory.
  Status Read(pid_t pid);

 private:
  static constexpr size_t kSpareIovecs = 2;

  iovec local_[kMaxIovecs];
  iovec remote_[kMaxIovecs];
  size_t local_count_ = 0;
  size_t remote_count_ = 0;
  uint64_t bytes_ = 0;
};

}  // namespace datadist

#endif  // DATADIST_TRANSPORT_CMA_PROCESS_MEMORY_H_
