// Lists of iovecs, in arrays of the caller's: how they grow and how they are used up.
#ifndef DATADIST_BASE_IOVECS_H_
#define DATADIST_BASE_IOVECS_H_

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>

namespace datadist {

constexpr size_t kMaxIovecs = 1024;  // of one system call: the kernel's UIO_MAXIOV

// Adds [base, +length) behind `count` entries; a neighbour of the last one makes that longer. An address is an integer
// because it may be another process's.
inline void AppendIovec(iovec *list, size_t &count, uintptr_t base, size_t length) {
  if (count > 0 && reinterpret_cast<uintptr_t>(list[count - 1].iov_base) + list[count - 1].iov_len == base) {
    list[count - 1].iov_len += length;
    return;
  }
  list[count++] = {reinterpret_cast<void *>(base), length};
}

// Drops the first `done` bytes, and entries of no bytes before the next.
inline void AdvanceIovecs(iovec *&next, size_t &count, size_t done) {
  while (count > 0 && done >= next->iov_len) {
    done -= next->iov_len;
    ++next;
    --count;
  }
  if (count > 0) {
    next->iov_base = reinterpret_cast<void *>(reinterpret_cast<uintptr_t>(next->iov_base) + done);
    next->iov_len -= done;
  }
}

}  // namespace datadist

#endif  // DATADIST_BASE_IOVECS_H_
