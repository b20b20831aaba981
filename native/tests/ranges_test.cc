// Sets of addresses against a bit per address.
#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "memory/ranges.h"

namespace datadist::testing {
namespace {

constexpr uint64_t kAddresses = 64;
using Bits = std::array<bool, kAddresses>;

Bits ToBits(const std::vector<Range> &ranges) {
  Bits bits{};
  for (const Range &range : ranges) {
    for (uint64_t address = range.begin; address < range.end; ++address) {
      bits[address] = true;
    }
  }
  return bits;
}

std::vector<Range> SomeRanges(std::mt19937 &random) {
  std::vector<Range> ranges(random() % 6);
  for (Range &range : ranges) {
    range.begin = random() % kAddresses;
    range.end = random() % (kAddresses + 1);  // also empty and reversed ones
  }
  return ranges;
}

void ExpectSet(const Ranges &ranges) {
  for (size_t i = 0; i < ranges.size(); ++i) {
    EXPECT_LT(ranges[i].begin, ranges[i].end);
    if (i > 0) {
      EXPECT_LT(ranges[i - 1].end, ranges[i].begin) << "not one range where they touch";
    }
  }
}

TEST(Ranges, AreWhatBitsSay) {
  std::mt19937 random(1);
  for (int round = 0; round < 5000; ++round) {
    const std::vector<Range> some = SomeRanges(random);
    const Ranges a = MakeRanges(some);
    const Ranges b = MakeRanges(SomeRanges(random));
    ExpectSet(a);
    EXPECT_EQ(ToBits(a), ToBits(some));

    Bits expected = ToBits(a);
    for (uint64_t i = 0; i < kAddresses; ++i) {
      expected[i] = expected[i] && !ToBits(b)[i];
    }
    const Ranges difference = Minus(a, b);
    ExpectSet(difference);
    EXPECT_EQ(ToBits(difference), expected);

    const uint64_t size = 1 + random() % 9;
    const Bits bits = ToBits(a);
    Bits whole{};
    for (uint64_t unit = 0; (unit + 1) * size <= kAddresses; ++unit) {
      bool full = true;
      for (uint64_t i = unit * size; i < (unit + 1) * size; ++i) {
        full = full && bits[i];
      }
      for (uint64_t i = unit * size; full && i < (unit + 1) * size; ++i) {
        whole[i] = true;
      }
    }
    EXPECT_EQ(ToBits(WholeUnits(a, size)), whole) << "units of " << size;
  }
}

TEST(Ranges, UnitsDoNotOverflowAtTheEndOfTheAddresses) {
  EXPECT_TRUE(WholeUnits({{UINT64_MAX - 1, UINT64_MAX}}, 2U << 20).empty());
}

}  // namespace
}  // namespace datadist::testing
