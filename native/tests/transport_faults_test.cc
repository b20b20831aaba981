// The process that owns the memory is killed or stops in the middle of transfers.
#include <gtest/gtest.h>

#include <atomic>
#include <string>
#include <thread>

#include "transport_support/initiator.h"
#include "transport_support/owner_process.h"

namespace datadist::test {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_TIMEOUT;
using std::chrono::milliseconds;
using std::chrono::seconds;

Deadline Soon() { return Deadline::In(seconds(30)); }

class OwnerDies : public testing::TestWithParam<const char *> {};

TEST_P(OwnerDies, KilledMidTransferEndsTheCall) {
  auto process = std::make_unique<OwnerProcess>();
  OwnerProcess &victim = *process;
  const std::unique_ptr<Owner> owner = std::move(process);
  const auto pool = std::make_shared<WorkerPool>(2);
  CallsTo calls{owner};
  const auto path = GetParam() == std::string("cma") ? ConnectCma(*owner, &calls, pool)
                                                      : ConnectTcp(*owner, 2, pool, seconds(30));
  const CacheShape shape{8, 1024, 4096};
  const RemoteCache remote = owner->AddCache(shape, 1);
  LocalCache local(shape, 2);
  const TransferOp op{&remote, &local.pin(), 0, 0, 8, {{0, 0, shape.num_blocks * shape.stride}}};
  std::atomic<int> pulls{0};
  Status last;
  std::thread puller([&] {
    do {
      last = path->Pull(op, Soon());
      ++pulls;
    } while (last.ok());
  });
  while (pulls.load() < 2) {
    std::this_thread::yield();
  }
  victim.Kill();
  puller.join();
  EXPECT_EQ(last.code(), LLM_FAILED) << last.text();
  EXPECT_FALSE(last.text().empty());
  EXPECT_EQ(path->Pull(op, Soon()).code(), LLM_FAILED);
  EXPECT_TRUE(local.CanariesIntact());
}

INSTANTIATE_TEST_SUITE_P(All, OwnerDies, testing::Values("cma", "tcp"),
                         [](const auto &test) { return std::string(test.param); });

// A stopped owner serves no tcp request: the call ends at its deadline and the path is lost with its framing. cma needs
// nothing of the owner and goes on.
TEST(OwnerStops, TcpTimesOutAtTheDeadline) {
  for (const bool pull : {true, false}) {
    OwnerProcess owner;
    const auto path = ConnectTcp(owner, 2, std::make_shared<WorkerPool>(2), seconds(30));
    const CacheShape shape{8, 1024, 4096};
    const RemoteCache remote = owner.AddCache(shape, 1);
    LocalCache local(shape, 2);
    const TransferOp op{&remote, &local.pin(), 0, 0, 8, {{0, 0, shape.num_blocks * shape.stride}}};
    ASSERT_TRUE(path->Pull(op, Soon()).ok());
    owner.Stop();
    const auto begin = Deadline::Clock::now();
    const Deadline deadline = Deadline::In(milliseconds(200));
    const Status status = pull ? path->Pull(op, deadline) : path->Push(op, deadline);
    const auto took = Deadline::Clock::now() - begin;
    EXPECT_EQ(status.code(), LLM_TIMEOUT) << status.text();
    EXPECT_GE(took, milliseconds(200));
    EXPECT_LT(took, seconds(20)) << "the path's own limit is 30 s";
    EXPECT_EQ(path->Pull(op, Soon()).code(), LLM_FAILED);
  }
}

TEST(OwnerStops, CmaStillReads) {
  auto process = std::make_unique<OwnerProcess>();
  OwnerProcess &stopped = *process;
  const std::unique_ptr<Owner> owner = std::move(process);
  CallsTo calls{owner};
  const auto path = ConnectCma(*owner, &calls, std::make_shared<WorkerPool>(2));
  const CacheShape shape{1, 4, 64};
  const RemoteCache remote = owner->AddCache(shape, 1);
  LocalCache local(shape, 2);
  const TransferOp op{&remote, &local.pin(), 0, 0, 1, {{0, 0, 256}}};
  stopped.Stop();
  EXPECT_TRUE(path->Pull(op, Soon()).ok());
  EXPECT_EQ(local.Bytes(), PatternOf(shape, 1));
}

}  // namespace
}  // namespace datadist::test

int main(int argc, char **argv) { return datadist::test::TestMain(argc, argv); }
