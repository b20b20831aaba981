// A TransferQueue over a provider whose calls the test lets go one by one.
#ifndef DATADIST_TESTS_SUPPORT_TRANSFER_QUEUE_FIXTURE_H_
#define DATADIST_TESTS_SUPPORT_TRANSFER_QUEUE_FIXTURE_H_

#include "provider/transfer_queue.h"
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>
#include <chrono>
#include <cstdint>
#include <future>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>
#include "support/gated_provider.h"

namespace datadist {

using std::chrono::milliseconds;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using datadist::testing::GatedProvider;

constexpr milliseconds kNoDeadline = std::chrono::hours(1);
constexpr milliseconds kSoon(20);

inline Operation Pull(uint64_t cluster, uint64_t label) {
  PullBlocksOp op;
  op.transfer.remote.cluster_id = cluster;
  op.transfer.src_blocks = {label};
  op.transfer.dst_blocks = {label};
  return op;
}

class TransferQueueTest : public ::testing::Test {
 protected:
  // Exactly `threads` at once, unless `patience` says when the queue takes those for stalled.
  void Start(int64_t threads, int64_t capacity = 64, bool gated = true, milliseconds patience = milliseconds::max()) {
    provider_ = std::make_shared<GatedProvider>(gated);
    auto created = TransferQueue::Create(provider_, threads, capacity, patience);
    ASSERT_TRUE(created.ok()) << created.status().text();
    queue_ = std::move(created).value();
  }

  uint64_t Submit(Operation operation, milliseconds deadline = kNoDeadline) {
    const auto submission = queue_->Submit(std::move(operation), deadline);
    EXPECT_EQ(submission.verdict, TransferQueue::Verdict::kAccepted);
    return submission.id;
  }

  bool EventReadable(int timeout_ms) {
    pollfd fd{queue_->event_fd(), POLLIN, 0};
    return ::poll(&fd, 1, timeout_ms) == 1;
  }

  // Waits on the eventfd alone: a completion that does not raise it would hang the test.
  std::vector<Completion> Collect(size_t count) {
    std::vector<Completion> collected;
    while (collected.size() < count && EventReadable(60'000)) {
      for (Completion &completion : queue_->Poll()) {
        collected.push_back(std::move(completion));
      }
    }
    EXPECT_EQ(collected.size(), count);
    return collected;
  }

  Completion CollectOne() {
    std::vector<Completion> one = Collect(1);
    return one.empty() ? Completion() : std::move(one.front());
  }

  std::shared_ptr<GatedProvider> provider_;
  std::unique_ptr<TransferQueue> queue_;
};

}  // namespace datadist

#endif  // DATADIST_TESTS_SUPPORT_TRANSFER_QUEUE_FIXTURE_H_
