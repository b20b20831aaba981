// Sets of addresses, as sorted ranges of which no two touch.
#ifndef DATADIST_MEMORY_RANGES_H_
#define DATADIST_MEMORY_RANGES_H_

#include <cstdint>
#include <vector>

namespace datadist {

struct Range {
  uint64_t begin = 0;
  uint64_t end = 0;  // exclusive; a range whose end is not above its begin holds nothing
};

using Ranges = std::vector<Range>;

// The set of all addresses in `ranges`, which may overlap and come in any order.
Ranges MakeRanges(std::vector<Range> ranges);
// What of `from` is not in `what`; both are sets.
Ranges Minus(const Ranges &from, const Ranges &what);
// The whole units of `size` bytes, at multiples of it, that `ranges` holds.
Ranges WholeUnits(const Ranges &ranges, uint64_t size);

}  // namespace datadist

#endif  // DATADIST_MEMORY_RANGES_H_
