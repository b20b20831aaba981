#include "memory/ranges.h"

#include <algorithm>

namespace datadist {

Ranges MakeRanges(std::vector<Range> ranges) {
  std::sort(ranges.begin(), ranges.end(), [](const Range &a, const Range &b) { return a.begin < b.begin; });
  Ranges set;
  for (const Range &range : ranges) {
    if (range.begin >= range.end) {
      continue;
    }
    if (!set.empty() && range.begin <= set.back().end) {
      set.back().end = std::max(set.back().end, range.end);
    } else {
      set.push_back(range);
    }
  }
  return set;
}

Ranges Minus(const Ranges &from, const Ranges &what) {
  Ranges left;
  auto next = what.begin();
  for (const Range &range : from) {
    uint64_t begin = range.begin;
    while (next != what.end() && next->end <= begin) {
      ++next;
    }
    for (auto cut = next; cut != what.end() && cut->begin < range.end; ++cut) {
      if (begin < cut->begin) {
        left.push_back({begin, cut->begin});
      }
      begin = std::max(begin, cut->end);
    }
    if (begin < range.end) {
      left.push_back({begin, range.end});
    }
  }
  return left;
}

Ranges WholeUnits(const Ranges &ranges, uint64_t size) {
  Ranges units;
  for (const Range &range : ranges) {
    const uint64_t first = range.begin / size + (range.begin % size != 0 ? 1 : 0);
    const uint64_t last = range.end / size;
    if (first < last) {
      units.push_back({first * size, last * size});
    }
  }
  return units;
}

}  // namespace datadist
