// Orders this thread's memory accesses against those that another process makes, or that the kernel makes for us.
// Locks and atomics of one process do not: a later store may overtake an earlier atomic one on weakly ordered machines.
#ifndef DATADIST_BASE_FENCE_H_
#define DATADIST_BASE_FENCE_H_

#include <atomic>

namespace datadist {

inline void FullFence() {
  // ThreadSanitizer does not model fences. Nothing is lost: it sees no other process either.
#pragma GCC diagnostic push
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#pragma GCC diagnostic ignored "-Wtsan"
#endif
  std::atomic_thread_fence(std::memory_order_seq_cst);
#pragma GCC diagnostic pop
}

}  // namespace datadist

#endif  // DATADIST_BASE_FENCE_H_
