// TransferQueue over a provider whose calls block until the test lets them go: every interleaving is chosen, none is
// waited for.
#include "support/transfer_queue_fixture.h"

namespace datadist {
namespace {

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

// Peers that do not answer hold no turn of others, as long as there are threads to be had.
TEST_F(TransferQueueTest, StalledOperationsHoldUpNobody) {
  constexpr uint64_t kStalled = TransferQueue::kMaxThreads - 1;
  constexpr uint64_t kHealthy = 1000;
  Start(4, 256, true, milliseconds(1));
  std::set<uint64_t> stalled;
  for (uint64_t cluster = 1; cluster <= kStalled; ++cluster) {
    Submit(Pull(cluster, cluster));
    stalled.insert(cluster);
  }
  provider_->AwaitStarted(stalled);
  for (uint64_t label = kHealthy; label < kHealthy + 100; ++label) {
    provider_->Open(label);
    const uint64_t id = Submit(Pull(kHealthy, label));
    EXPECT_EQ(CollectOne().id, id);
  }
  Submit(Pull(kHealthy, 1));  // stalls, too
  const uint64_t too_many = Submit(Pull(kHealthy + 1, 2000), milliseconds(200));
  EXPECT_EQ(CollectOne().id, too_many) << "there is an end to threads";
  for (const uint64_t label : stalled) {
    provider_->Open(label);
  }
  Collect(kStalled + 1);
  EXPECT_FALSE(provider_->lane_violated());
}

TEST_F(TransferQueueTest, NoMoreThanItsThreadsRunWhileTheyAreNotStalled) {
  Start(2);
  Submit(Pull(1, 1), kNoDeadline);
  Submit(Pull(2, 2), kNoDeadline);
  provider_->AwaitStarted({1, 2});
  Submit(Pull(3, 3), kSoon);
  EXPECT_EQ(CollectOne().status, llm_datadist::LLM_TIMEOUT);
  EXPECT_EQ(provider_->order().size(), 2U);
  provider_->Open(1);
  provider_->Open(2);
  Collect(2);
}

TEST_F(TransferQueueTest, ExpiresAtTheDeadlineWhileEveryThreadIsBusy) {
  Start(1);
  const uint64_t running = Submit(Pull(1, 1));
  provider_->AwaitStarted({1});
  const uint64_t behind_in_lane = Submit(Pull(1, 2), kSoon);
  const Completion first = CollectOne();
  EXPECT_EQ(first.id, behind_in_lane);
  EXPECT_EQ(first.status, llm_datadist::LLM_TIMEOUT);
  EXPECT_TRUE(first.cancelled) << "taken for a fault of the link, it would cost whoever waits for that";
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

// The first ones as well as those that are started when these wait for peers.
TEST_F(TransferQueueTest, EveryThreadEntersBeforeItCalls) {
  Start(1, 64, true, milliseconds(1));
  Submit(Pull(1, 1));
  Submit(Pull(2, 2));
  Submit(Pull(3, 3));
  provider_->AwaitStarted({1, 2, 3});
  for (const uint64_t label : {1, 2, 3}) {
    provider_->Open(label);
  }
  Collect(3);
  EXPECT_FALSE(provider_->stranger_called());
}

TEST_F(TransferQueueTest, AThreadThatMayNotEnterCallsNothing) {
  const auto provider = std::make_shared<GatedProvider>(false, Status(llm_datadist::LLM_FAILED, "no such device"));
  auto created = TransferQueue::Create(provider, 1, 8);
  ASSERT_TRUE(created.ok());
  queue_ = std::move(created).value();
  Submit(Pull(1, 1));
  const Completion refused = CollectOne();
  EXPECT_EQ(refused.status, llm_datadist::LLM_FAILED);
  EXPECT_EQ(refused.error, "no such device");
  EXPECT_TRUE(provider->order().empty());
}

}  // namespace
}  // namespace datadist
