// Huge pages under registered memory. cma pins and copies page by page: with pages of 2 MiB it moves bytes about two and
// a half times as fast as with pages of 4 KiB.
#ifndef DATADIST_MEMORY_HUGE_PAGES_H_
#define DATADIST_MEMORY_HUGE_PAGES_H_

#include <cstdint>
#include <vector>

namespace datadist {

// Asks the kernel for huge pages in `bytes` bytes at each address: under what is not touched yet when it is, under the
// rest now. A hint: what cannot have them (file mappings, less than a huge page, no such memory) stays as it is. No
// byte changes.
void AdviseHugePages(std::vector<uint64_t> addrs, uint64_t bytes);

}  // namespace datadist

#endif  // DATADIST_MEMORY_HUGE_PAGES_H_
