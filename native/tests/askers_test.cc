// Who has left the channel: what a server remembers of it.
#include "channel/askers.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <vector>

namespace datadist::testing {
namespace {

using std::chrono::milliseconds;

TEST(Askers, HaveTheirGraceAndALimit) {
  const auto now = std::chrono::steady_clock::now();
  Askers askers(milliseconds(100));
  askers.Came(1);
  askers.Left(1, now);
  EXPECT_TRUE(askers.TakeLeft(now + milliseconds(99)).empty());
  askers.Came(1);
  EXPECT_TRUE(askers.TakeLeft(now + milliseconds(100)).empty()) << "it has come back";
  askers.Left(1, now);
  askers.Left(1, now);
  EXPECT_EQ(askers.TakeLeft(now + milliseconds(100)), std::vector<uint64_t>{1});
  for (uint64_t cluster = 1; cluster <= 2 * Askers::kMaxLeft; ++cluster) {
    askers.Came(cluster);
    askers.Left(cluster, now);
  }
  EXPECT_EQ(askers.TakeLeft(now + milliseconds(100)).size(), Askers::kMaxLeft);
}

}  // namespace
}  // namespace datadist::testing
