// What the log tells of the calls of an endpoint.
#include "engine/statistics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <future>
#include <memory>
#include <string>

namespace datadist {
namespace {

using ::testing::MatchesRegex;

// Timers run in order of their times, so the log's have run when one that starts after them has.
void WaitForIntervals(EventLoop *loop, int count) {
  std::promise<void> passed;
  loop->Run([&] {
    loop->StartTimerOnLoop(EventLoop::Clock::now() + std::chrono::milliseconds(count), [&] { passed.set_value(); });
  });
  passed.get_future().wait();
}

Status Fail() { return Status(llm_datadist::LLM_TIMEOUT, "late"); }

TEST(Statistics, CountsCallsAndFailuresOfEachKind) {
  Statistics statistics(7);
  EXPECT_EQ(statistics.Text(), "no calls");
  EXPECT_TRUE(statistics.Count(Statistics::Call::kPull, [] { return Status::Ok(); }).ok());
  EXPECT_EQ(statistics.Count(Statistics::Call::kPull, Fail).code(), llm_datadist::LLM_TIMEOUT) << "passed on";
  EXPECT_TRUE(statistics.Count(Statistics::Call::kLink, [] { return Status::Ok(); }).ok());
  EXPECT_THAT(statistics.Text(), MatchesRegex("links 1 .0 failed, mean [0-9]+ us, longest [0-9]+ us., "
                                              "pulls 2 .1 failed, mean [0-9]+ us, longest [0-9]+ us."));
}

TEST(Statistics, LogsAgainWhereSomethingHappened) {
  ASSERT_EQ(setenv("ASCEND_GLOBAL_LOG_LEVEL", "1", 1), 0);
  ::testing::internal::CaptureStderr();
  {
    EventLoop loop;
    ASSERT_TRUE(loop.Start().ok());
    const auto statistics = std::make_shared<Statistics>(7);
    loop.Run([&] { statistics->StartOnLoop(&loop, std::chrono::milliseconds(1)); });
    for (int calls = 1; calls <= 2; ++calls) {
      EXPECT_TRUE(statistics->Count(Statistics::Call::kPush, [] { return Status::Ok(); }).ok());
      WaitForIntervals(&loop, 20);
    }
  }
  const std::string log = ::testing::internal::GetCapturedStderr();
  EXPECT_THAT(log, MatchesRegex(".datadist. INFO cluster 7: pushes 1 .*\n"
                                ".datadist. INFO cluster 7: pushes 2 .*\n"));
}

}  // namespace
}  // namespace datadist
