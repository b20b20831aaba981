// The reporter of a worker against a real instance, and against ones that are slow, wrong or not there.
#include <gtest/gtest.h>
#include <stdlib.h>

#include <chrono>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "channel/progress_reporter.h"
#include "support/channel_ends.h"
#include "support/eventually.h"

namespace datadist::testing {
namespace {

using std::chrono::milliseconds;
using Entries = std::vector<ProgressReporter::Entry>;

constexpr LeaseToken kToken{1};
constexpr LeaseToken kOther{2};
constexpr RankId kRank{1, 2};
constexpr HandoffKey kKey{3};

std::unique_ptr<ProgressReporter> Reporter(const ReporterLimits &limits = {}) {
  return std::move(ProgressReporter::Create(kContentVersion, kRank, Anybody(), limits)).value();
}

ProgressReporter::Endpoint At(uint16_t port) { return {"127.0.0.1", port}; }

LeaseToken TokenOf(size_t number) { return {9, static_cast<uint8_t>(number), static_cast<uint8_t>(number >> 8U)}; }

std::string TextOf(const ProgressMark &mark) {
  std::string text = std::to_string(mark.epoch) + ": " + std::to_string(mark.base) + " " + std::to_string(mark.next);
  for (const uint8_t byte : mark.layers) {
    text += " " + std::to_string(byte);
  }
  return text;
}

// An instance whose answers are the test's.
class SlowInstance {
 public:
  uint16_t port() const { return server_.port(); }
  void Welcome() { fd_ = server_.Welcome(); }
  ReportProgress Receive() {
    const Result<Frame> frame = ReceiveRequest(fd_);
    EXPECT_TRUE(frame.ok() && frame.value().type == MessageType::kReport);
    seq_ = frame.ok() ? frame.value().seq : 0;
    return frame.ok() ? Decode<ReportProgress>(frame.value().body).value() : ReportProgress{};
  }
  void Answer() { EXPECT_TRUE(SendFrame(fd_.get(), MessageType::kReported, seq_, {}, Soon()).ok()); }
  bool HasMore() const {
    pollfd waiter{fd_.get(), POLLIN, 0};
    return ::poll(&waiter, 1, 50) == 1;
  }

 private:
  const BareServer server_;
  Fd fd_;
  uint32_t seq_ = 0;
};

TEST(ProgressReporter, TellsWhatAStepHasWritten) {
  const ServerEnd server;
  const auto reporter = Reporter();
  const auto is = [&](const LeaseToken &token, const std::string &text) {
    return Eventually([&] { return TextOf(server.handoffs->Look(token, kRank, 0).mark) == text; });
  };
  ASSERT_TRUE(server.handoffs->Promise(kToken, "r"));
  ASSERT_TRUE(server.handoffs->Promise(kOther, "r"));
  reporter->Layer(0);
  reporter->EndStep();
  EXPECT_EQ(reporter->size(), 0U) << "a step of nobody's";
  ASSERT_TRUE(reporter->BeginStep(At(server.port()), server.handoffs->key(), {{kToken, 1, 0, 16}}).ok());
  EXPECT_TRUE(is(kToken, "1: 0 16"));
  reporter->Layer(0);
  reporter->Layer(9);
  EXPECT_TRUE(is(kToken, "1: 0 16 1 2"));
  reporter->Layer(std::numeric_limits<size_t>::max());
  EXPECT_EQ(reporter->size(), 1U);
  reporter->EndStep();
  EXPECT_TRUE(is(kToken, "1: 16 16"));
  EXPECT_TRUE(Eventually([&] { return reporter->size() == 0; })) << "all is told";
  const Entries two = {{kToken, 2, 16, 32}, {kOther, 5, 0, 4}};
  ASSERT_TRUE(reporter->BeginStep(At(server.port()), server.handoffs->key(), two).ok());
  reporter->Layer(1);
  EXPECT_TRUE(is(kToken, "2: 16 32 2"));
  EXPECT_TRUE(is(kOther, "5: 0 4 2"));
  // Without an end of the one before, nothing of it is known to be there but the layers that were told.
  ASSERT_TRUE(reporter->BeginStep(At(server.port()), server.handoffs->key(), {{kOther, 5, 4, 8}}).ok());
  EXPECT_TRUE(is(kOther, "5: 4 8"));
  EXPECT_TRUE(Eventually([&] { return reporter->size() == 1; }));
  EXPECT_TRUE(is(kToken, "2: 16 32 2"));
  EXPECT_FALSE(reporter->BeginStep(At(server.port()), server.handoffs->key(), {{kOther, 5, 9, 8}}).ok());
}

// However often a layer ends, an instance that is slow has one REPORT to answer, and the next says what is newest.
TEST(ProgressReporter, HasOneReportUnanswered) {
  SlowInstance instance;
  const auto reporter = Reporter();
  ASSERT_TRUE(reporter->BeginStep(At(instance.port()), kKey, {{kToken, 1, 0, 16}}).ok());
  instance.Welcome();
  const ReportProgress first = instance.Receive();
  EXPECT_EQ(first.key, kKey);
  EXPECT_EQ(first.rank.pp_rank, kRank.pp_rank);
  EXPECT_EQ(first.rank.tp_rank, kRank.tp_rank);
  ASSERT_EQ(first.marks.size(), 1U);
  EXPECT_EQ(TextOf(first.marks[0].second), "1: 0 16");
  for (size_t layer = 0; layer < 8; ++layer) {
    reporter->Layer(layer);
  }
  EXPECT_FALSE(instance.HasMore());
  instance.Answer();
  EXPECT_EQ(TextOf(instance.Receive().marks.at(0).second), "1: 0 16 255");
  reporter->EndStep();
  EXPECT_EQ(reporter->size(), 1U);
  instance.Answer();
  EXPECT_EQ(TextOf(instance.Receive().marks.at(0).second), "1: 16 16");
  EXPECT_EQ(reporter->size(), 1U) << "not heard yet";
  instance.Answer();
  EXPECT_TRUE(Eventually([&] { return reporter->size() == 0; }));
  EXPECT_FALSE(instance.HasMore());
}

// A step that failed, say: D must not read what it has not written.
TEST(ProgressReporter, AStepThatWasNotEndedIsNotDone) {
  SlowInstance instance;
  const auto reporter = Reporter();
  ASSERT_TRUE(reporter->BeginStep(At(instance.port()), kKey, {{kToken, 1, 0, 16}}).ok());
  instance.Welcome();
  (void)instance.Receive();
  reporter->Layer(0);
  ASSERT_TRUE(reporter->BeginStep(At(instance.port()), kKey, {{kOther, 1, 0, 4}}).ok());
  reporter->Layer(1);
  instance.Answer();
  const ReportProgress report = instance.Receive();
  ASSERT_EQ(report.marks.size(), 2U);
  EXPECT_EQ(TextOf(report.marks[0].second), "1: 0 4 2");
  EXPECT_EQ(TextOf(report.marks[1].second), "1: 0 16 1");
}

TEST(ProgressReporter, TellsAgainWhatWasNotAnswered) {
  SlowInstance instance;
  const auto reporter = Reporter({16, milliseconds(1000), milliseconds(10), kLong * 10});
  ASSERT_TRUE(reporter->BeginStep(At(instance.port()), kKey, {{kToken, 1, 0, 16}, {kOther, 1, 0, 4}}).ok());
  reporter->EndStep();
  for (int round = 0; round < 3; ++round) {
    instance.Welcome();  // one that let a request time out gets a fresh connection
    EXPECT_EQ(instance.Receive().marks.size(), 2U);
  }
  instance.Welcome();
  EXPECT_EQ(instance.Receive().marks.size(), 2U);
  instance.Answer();
  EXPECT_TRUE(Eventually([&] { return reporter->size() == 0; }));
}

// More than a message has room for: all get their turn, also while those of the first message go on moving.
TEST(ProgressReporter, StarvesNobody) {
  constexpr size_t kEntries = 2 * kMaxMarksPerReport + 1;
  SlowInstance instance;
  const auto reporter = Reporter();
  Entries entries;
  for (size_t i = 0; i < kEntries; ++i) {
    entries.push_back({TokenOf(i), 1, 0, 16});
  }
  ASSERT_TRUE(reporter->BeginStep(At(instance.port()), kKey, entries).ok());
  instance.Welcome();
  std::set<LeaseToken> told;
  for (size_t layer = 0; layer < 3; ++layer) {
    const ReportProgress report = instance.Receive();
    EXPECT_EQ(report.marks.size(), kMaxMarksPerReport);
    for (const auto &[token, mark] : report.marks) {
      told.insert(token);
    }
    reporter->Layer(layer);
    instance.Answer();
  }
  EXPECT_EQ(told.size(), kEntries);
}

TEST(ProgressReporter, DropsWhatNobodyHears) {
  ::testing::internal::CaptureStderr();
  const uint16_t nobody = BareServer().port();
  {
    const auto reporter = Reporter({4, milliseconds(1000), milliseconds(1), milliseconds(20)});
    for (int round = 0; round < 3; ++round) {
      Entries entries;
      for (size_t i = 0; i < 8; ++i) {
        entries.push_back({TokenOf(i), 1, 0, 16});
      }
      ASSERT_TRUE(reporter->BeginStep(At(nobody), kKey, entries).ok());
      EXPECT_LE(reporter->size(), 4U);
      reporter->EndStep();
      EXPECT_TRUE(Eventually([&] { return reporter->size() == 0; }));
    }
    // Who answers again is told again.
    const ServerEnd server;
    ASSERT_TRUE(server.handoffs->Promise(kToken, "r"));
    ASSERT_TRUE(reporter->BeginStep(At(server.port()), server.handoffs->key(), {{kToken, 1, 0, 16}}).ok());
    EXPECT_TRUE(Eventually([&] { return server.handoffs->Look(kToken, kRank, 0).mark.next == 16; }));
  }
  const std::string log = ::testing::internal::GetCapturedStderr();
  const size_t first = log.find("cannot be told");
  EXPECT_NE(first, std::string::npos) << log;
  EXPECT_EQ(log.find("cannot be told", first + 1), std::string::npos) << log;
}

// One whose key is another's, after a restart perhaps, is not heard, and does not stay in the way.
TEST(ProgressReporter, IsNotHeardWithAnotherKey) {
  const ServerEnd server;
  const auto reporter = Reporter({16, milliseconds(50), milliseconds(1), milliseconds(100)});
  ASSERT_TRUE(server.handoffs->Promise(kToken, "r"));
  ASSERT_TRUE(reporter->BeginStep(At(server.port()), kKey, {{kToken, 1, 0, 16}}).ok());
  reporter->EndStep();
  EXPECT_TRUE(Eventually([&] { return reporter->size() == 0; }));
  EXPECT_EQ(server.handoffs->Look(kToken, kRank, 0).mark.next, 0U);
}

// Told by several threads while it reports, and closed under them.
TEST(ProgressReporter, RacingThreadsAndItsEnd) {
  const ServerEnd server;
  const auto reporter = Reporter();
  ASSERT_TRUE(server.handoffs->Promise(kToken, "r"));
  std::vector<std::thread> threads;
  for (uint32_t i = 0; i < 3; ++i) {
    threads.emplace_back([&, i] {
      for (uint32_t step = 0; step < 200; ++step) {
        EXPECT_TRUE(reporter->BeginStep(At(server.port()), server.handoffs->key(),
                                        {{kToken, step + 1, 0, 16}, {TokenOf(i), 1, step, step + 1}})
                        .ok());
        reporter->Layer(i);
        reporter->EndStep();
        if (i == 0 && step == 150) {
          reporter->Close();
        }
      }
    });
  }
  for (std::thread &thread : threads) {
    thread.join();
  }
  reporter->Close();
}

}  // namespace
}  // namespace datadist::testing

int main(int argc, char **argv) {
  // Read once, by the first line that is logged.
  ::setenv("ASCEND_GLOBAL_LOG_LEVEL", "2", 1);
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
