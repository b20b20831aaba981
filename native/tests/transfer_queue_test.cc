// TransferQueue over a provider whose calls block until the test lets them go: every interleaving is chosen, none is
// waited for.
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
namespace {

using std::chrono::milliseconds;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using datadist::testing::GatedProvider;

constexpr milliseconds kNoDeadline = std::chrono::hours(1);
constexpr milliseconds kSoon(20);

Operation Pull(uint64_t cluster, uint64_t label) {
  PullBlocksOp op;
  op.transfer.remote.cluster_id = cluster;
  op.transfer.src_blocks = {label};
  op.transfer.dst_blocks = {label};
  return op;
}

class TransferQueueTest : public ::testing::Test {
 protected:
  void Start(int64_t threads, int64_t capacity = 64, bool gated = true) {
    provider_ = std::make_shared<GatedProvider>(gated);
    auto created = TransferQueue::Create(provider_, threads, capacity);
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

TEST_F(TransferQueueTest, CompletesWithWhatTheCallReturned) {
  Start(1, 8, false);
  LinkOp link;
  link.cluster.remote_cluster_id = 7;
  link.timeout_ms = 250;
  const uint64_t id = Submit(link);
  const Completion completion = CollectOne();
  EXPECT_EQ(completion.id, id);
  EXPECT_EQ(completion.status, llm_datadist::LLM_LINK_FAILED);
  EXPECT_EQ(completion.error, "link of 7 within 250");
  EXPECT_FALSE(completion.cancelled);
  EXPECT_GE(completion.queued.count(), 0.0);
  EXPECT_GE(completion.run.count(), 0.0);

  UnlinkOp unlink;
  unlink.force = true;
  Submit(unlink);
  EXPECT_EQ(CollectOne().status, llm_datadist::LLM_SUCCESS);
  Submit(RefusedOp{7, Status(llm_datadist::LLM_PARAM_INVALID, "wrong from the start")});
  const Completion refused = CollectOne();
  EXPECT_EQ(refused.status, llm_datadist::LLM_PARAM_INVALID);
  EXPECT_EQ(refused.error, "wrong from the start");
}

TEST_F(TransferQueueTest, OneClusterRunsInOrderAndOneAtATime) {
  Start(4);
  Submit(Pull(1, 10));
  Submit(Pull(1, 11));
  Submit(Pull(1, 12));
  Submit(Pull(2, 20));  // proof that a second lane started while the first one's next operations had not
  provider_->AwaitStarted({10, 20});
  EXPECT_EQ(provider_->order().size(), 2U);
  for (const uint64_t label : {20, 12, 11, 10}) {
    provider_->Open(label);
  }
  Collect(4);
  std::vector<uint64_t> lane;
  for (const uint64_t label : provider_->order()) {
    if (label < 20) {
      lane.push_back(label);
    }
  }
  EXPECT_THAT(lane, ElementsAre(10, 11, 12));
  EXPECT_FALSE(provider_->lane_violated());
}

TEST_F(TransferQueueTest, DifferentClustersRunInParallel) {
  Start(3);
  Submit(Pull(1, 1));
  Submit(Pull(2, 2));
  Submit(Pull(3, 3));
  provider_->AwaitStarted({1, 2, 3});  // would never come with fewer than three at once
  for (const uint64_t label : {1, 2, 3}) {
    provider_->Open(label);
  }
  Collect(3);
}

TEST_F(TransferQueueTest, ABusyClusterDoesNotStarveOthers) {
  Start(1);
  Submit(Pull(1, 10));
  provider_->AwaitStarted({10});
  Submit(Pull(1, 11));
  Submit(Pull(1, 12));
  Submit(Pull(2, 20));
  for (const uint64_t label : {10, 11, 12, 20}) {
    provider_->Open(label);
  }
  Collect(4);
  EXPECT_THAT(provider_->order(), ElementsAre(10, 20, 11, 12));
}

TEST_F(TransferQueueTest, ExpiresAtTheDeadlineWhileEveryThreadIsBusy) {
  Start(1);
  const uint64_t running = Submit(Pull(1, 1));
  provider_->AwaitStarted({1});
  const uint64_t behind_in_lane = Submit(Pull(1, 2), kSoon);
  const Completion first = CollectOne();
  EXPECT_EQ(first.id, behind_in_lane);
  EXPECT_EQ(first.status, llm_datadist::LLM_TIMEOUT);
  EXPECT_FALSE(first.cancelled);
  EXPECT_THAT(first.error, HasSubstr("deadline"));
  EXPECT_GE(first.queued, kSoon);
  EXPECT_EQ(first.run.count(), 0.0);

  const uint64_t no_thread_free = Submit(Pull(2, 3), kSoon);
  EXPECT_EQ(CollectOne().id, no_thread_free);
  provider_->Open(1);
  EXPECT_EQ(CollectOne().id, running);
  EXPECT_THAT(provider_->order(), ElementsAre(1));
}

TEST_F(TransferQueueTest, AnEarlierDeadlineOvertakesALaterOne) {
  Start(1);
  Submit(Pull(1, 1));
  provider_->AwaitStarted({1});
  Submit(Pull(2, 2), kNoDeadline);
  const uint64_t early = Submit(Pull(3, 3), kSoon);
  EXPECT_EQ(CollectOne().id, early);
  provider_->Open(1);
  provider_->Open(2);
  Collect(2);
}

TEST_F(TransferQueueTest, DeadlinesFromOutsideCannotOverflow) {
  Start(1);
  Submit(Pull(1, 1), milliseconds::max());
  provider_->AwaitStarted({1});
  const uint64_t past = Submit(Pull(1, 2), milliseconds::min());
  EXPECT_EQ(CollectOne().id, past);
  provider_->Open(1);
  EXPECT_EQ(CollectOne().status, llm_datadist::LLM_SUCCESS);
}

TEST_F(TransferQueueTest, CancelsOnlyWhatHasNotStarted) {
  Start(1);
  const uint64_t running = Submit(Pull(1, 1));
  provider_->AwaitStarted({1});
  const uint64_t waiting = Submit(Pull(1, 2));
  EXPECT_FALSE(queue_->Cancel(running));
  EXPECT_FALSE(queue_->Cancel(waiting + 1));
  EXPECT_TRUE(queue_->Cancel(waiting));
  EXPECT_FALSE(queue_->Cancel(waiting));
  const Completion cancelled = CollectOne();
  EXPECT_EQ(cancelled.id, waiting);
  EXPECT_TRUE(cancelled.cancelled);
  EXPECT_EQ(cancelled.status, llm_datadist::LLM_FAILED);
  provider_->Open(1);
  const Completion ended = CollectOne();
  EXPECT_EQ(ended.id, running);
  EXPECT_FALSE(ended.cancelled);
  EXPECT_FALSE(queue_->Cancel(running));
  EXPECT_THAT(provider_->order(), ElementsAre(1));
}

TEST_F(TransferQueueTest, ALaneThatWasEmptiedByCancelWorksAgain) {
  Start(1);
  Submit(Pull(1, 1));
  provider_->AwaitStarted({1});
  EXPECT_TRUE(queue_->Cancel(Submit(Pull(2, 2))));
  Submit(Pull(2, 3));
  provider_->Open(1);
  provider_->Open(3);
  Collect(3);
  EXPECT_THAT(provider_->order(), ElementsAre(1, 3));
}

TEST_F(TransferQueueTest, RefusesBeyondItsCapacity) {
  Start(1, 2);
  Submit(Pull(1, 1));
  provider_->AwaitStarted({1});
  const uint64_t waiting = Submit(Pull(1, 2));
  const auto refused = queue_->Submit(Pull(1, 3), kNoDeadline);
  EXPECT_EQ(refused.verdict, TransferQueue::Verdict::kFull);
  EXPECT_EQ(refused.id, 0U);
  EXPECT_TRUE(queue_->Cancel(waiting));  // frees a place, whether or not its completion was polled
  Submit(Pull(1, 4));
  provider_->Open(1);
  provider_->Open(4);
  Collect(3);
}

TEST_F(TransferQueueTest, EventIsReadableExactlyWhileCompletionsWait) {
  Start(1, 8, false);
  EXPECT_FALSE(EventReadable(0));
  Submit(Pull(1, 1));
  EXPECT_TRUE(EventReadable(60'000));
  EXPECT_EQ(queue_->Poll().size(), 1U);
  EXPECT_FALSE(EventReadable(0));
  EXPECT_TRUE(queue_->Poll().empty());
  const int flags = ::fcntl(queue_->event_fd(), F_GETFD);
  EXPECT_TRUE((flags & FD_CLOEXEC) != 0);
  EXPECT_TRUE((::fcntl(queue_->event_fd(), F_GETFL) & O_NONBLOCK) != 0);
}

TEST_F(TransferQueueTest, DrainCancelsWaitsAndRefuses) {
  Start(1);
  const uint64_t running = Submit(Pull(1, 1));
  provider_->AwaitStarted({1});
  const uint64_t waiting = Submit(Pull(1, 2));
  EXPECT_FALSE(queue_->Drain(milliseconds(0)));
  const Completion cancelled = CollectOne();
  EXPECT_EQ(cancelled.id, waiting);
  EXPECT_TRUE(cancelled.cancelled);
  EXPECT_EQ(queue_->Submit(Pull(1, 3), kNoDeadline).verdict, TransferQueue::Verdict::kClosed);
  auto drained = std::async(std::launch::async, [this] { return queue_->Drain(kNoDeadline); });
  provider_->Open(1);
  EXPECT_TRUE(drained.get());
  EXPECT_EQ(CollectOne().id, running);
}

TEST_F(TransferQueueTest, CloseCompletesEveryAcceptedOperation) {
  Start(2);
  std::set<uint64_t> ids = {Submit(Pull(1, 1)), Submit(Pull(2, 2))};
  provider_->AwaitStarted({1, 2});
  for (uint64_t label = 3; label < 20; ++label) {
    ids.insert(Submit(Pull(label % 3, label)));
  }
  std::thread closer([this] { queue_->Close(); });
  std::thread another([this] { queue_->Close(); });
  // Only once all that waited is cancelled: else a lane's next operation starts, and blocks at its gate.
  std::vector<Completion> completions = Collect(ids.size() - 2);
  provider_->Open(1);
  provider_->Open(2);
  closer.join();
  another.join();
  queue_->Close();
  for (Completion &completion : queue_->Poll()) {
    completions.push_back(std::move(completion));
  }
  std::set<uint64_t> completed;
  for (const Completion &completion : completions) {
    EXPECT_TRUE(completed.insert(completion.id).second) << completion.id << " completed twice";
  }
  EXPECT_EQ(completed, ids);
}

TEST_F(TransferQueueTest, DestructionWaitsForWhatRuns) {
  Start(1);
  Submit(Pull(1, 1));
  provider_->AwaitStarted({1});
  std::promise<void> destroyed;
  std::future<void> done = destroyed.get_future();
  std::thread owner([&] {
    queue_.reset();
    destroyed.set_value();
  });
  EXPECT_EQ(done.wait_for(kSoon), std::future_status::timeout);  // the call may still write into the caller's memory
  provider_->Open(1);
  done.get();
  owner.join();
}

TEST_F(TransferQueueTest, AForkedChildMayDestroyIt) {
  Start(1);
  Submit(Pull(1, 1));
  provider_->AwaitStarted({1});
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    ::alarm(30);
    queue_.reset();
    ::_exit(0);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << "killed by signal " << WTERMSIG(status);
  provider_->Open(1);
  Collect(1);
}

TEST_F(TransferQueueTest, SizesOutOfRangeAreNamed) {
  auto provider = std::make_shared<GatedProvider>(false);
  for (const int64_t threads : {int64_t{-1}, int64_t{0}, TransferQueue::kMaxThreads + 1}) {
    const auto refused = TransferQueue::Create(provider, threads, 1);
    ASSERT_FALSE(refused.ok());
    EXPECT_EQ(refused.status().code(), llm_datadist::LLM_PARAM_INVALID);
    EXPECT_THAT(refused.status().text(), HasSubstr("threads is " + std::to_string(threads) + "; allowed: 1..64"));
  }
  for (const int64_t capacity : {int64_t{-1}, int64_t{0}, TransferQueue::kMaxCapacity + 1}) {
    const auto refused = TransferQueue::Create(provider, 1, capacity);
    ASSERT_FALSE(refused.ok());
    EXPECT_THAT(refused.status().text(), HasSubstr("capacity is " + std::to_string(capacity)));
  }
}

// Submitters, a canceller and a poller at once; deadlines from "already over" to "never".
TEST_F(TransferQueueTest, EveryAcceptedIdCompletesExactlyOnceUnderLoad) {
  constexpr size_t kSubmitters = 3;
  constexpr uint64_t kEach = 1'000;
  Start(4, 128, false);
  std::mutex mutex;
  std::set<uint64_t> accepted;
  std::vector<std::thread> submitters;
  for (size_t s = 0; s < kSubmitters; ++s) {
    submitters.emplace_back([&, s] {
      std::mt19937 random(static_cast<uint32_t>(s));
      for (uint64_t i = 0; i < kEach; ++i) {
        const auto submission = queue_->Submit(Pull(random() % 5, s * kEach + i), milliseconds(random() % 4));
        if (submission.verdict != TransferQueue::Verdict::kAccepted) {
          std::this_thread::yield();  // full: this one is not submitted again
          continue;
        }
        {
          const std::lock_guard<std::mutex> lock(mutex);
          accepted.insert(submission.id);
        }
        if (random() % 3 == 0) {
          queue_->Cancel(submission.id);
        }
      }
    });
  }
  std::multiset<uint64_t> completed;
  const auto collect = [&] {
    for (const Completion &completion : queue_->Poll()) {
      completed.insert(completion.id);
    }
  };
  std::promise<void> submitted;
  std::future<void> all_submitted = submitted.get_future();
  std::thread waiter([&] {
    for (std::thread &submitter : submitters) {
      submitter.join();
    }
    submitted.set_value();
  });
  while (all_submitted.wait_for(milliseconds(0)) != std::future_status::ready) {
    EventReadable(5);
    collect();
  }
  waiter.join();
  queue_->Close();
  collect();
  EXPECT_GT(accepted.size(), 0U);
  EXPECT_EQ(completed, std::multiset<uint64_t>(accepted.begin(), accepted.end()));
  EXPECT_FALSE(provider_->lane_violated());
}

}  // namespace
}  // namespace datadist
