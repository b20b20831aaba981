#include "memory/huge_pages.h"

#include <sys/mman.h>

#include <algorithm>

namespace datadist {
namespace {

constexpr uint64_t kHugePage = 2ULL << 20;
constexpr int kCollapse = 25;  // MADV_COLLAPSE (Linux 6.1), which older headers lack; older kernels refuse it

void Advise(uint64_t begin, uint64_t end) {
  const uint64_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uint64_t last = end / kHugePage * kHugePage;
  if (first >= last) {
    return;
  }
  void *const start = reinterpret_cast<void *>(static_cast<uintptr_t>(first));
  if (::madvise(start, last - first, MADV_HUGEPAGE) == 0) {
    ::madvise(start, last - first, kCollapse);
  }
}

}  // namespace

void AdviseHugePages(std::vector<uint64_t> addrs, uint64_t bytes) {
  std::sort(addrs.begin(), addrs.end());
  // Tensors that touch one another count as one range: a huge page may lie under the end of one and the start of the
  // next.
  for (size_t i = 0; i < addrs.size();) {
    const uint64_t begin = addrs[i];
    uint64_t end = begin + bytes;
    for (++i; i < addrs.size() && addrs[i] <= end; ++i) {
      end = addrs[i] + bytes;
    }
    Advise(begin, end);
  }
}

}  // namespace datadist
