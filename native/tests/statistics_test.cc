// What the log tells of the calls of an endpoint.
#include "engine/statistics.h"

#include <gtest/gtest.h>

#include <regex>

namespace datadist {
namespace {

Status Fail() { return Status(llm_datadist::LLM_TIMEOUT, "late"); }

TEST(Statistics, CountsCallsAndFailuresOfEachKind) {
  Statistics statistics(7);
  EXPECT_EQ(statistics.Text(), "no calls");
  EXPECT_TRUE(statistics.Count(Statistics::Call::kPull, [] { return Status::Ok(); }).ok());
  EXPECT_EQ(statistics.Count(Statistics::Call::kPull, Fail).code(), llm_datadist::LLM_TIMEOUT) << "passed on";
  EXPECT_TRUE(statistics.Count(Statistics::Call::kLink, [] { return Status::Ok(); }).ok());
  const std::regex expected(
      R"(links 1 \(0 failed, mean \d+ us, longest \d+ us\), pulls 2 \(1 failed, mean \d+ us, longest \d+ us\))");
  EXPECT_TRUE(std::regex_match(statistics.Text(), expected)) << statistics.Text();
}

}  // namespace
}  // namespace datadist
