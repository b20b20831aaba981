// The end of a TransferQueue: drain, close, destruction, fork; and that nothing is lost under load.
#include <unistd.h>

#include "support/transfer_queue_fixture.h"

namespace datadist {
namespace {

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
