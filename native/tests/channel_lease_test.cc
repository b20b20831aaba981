// The lease table as several threads use it; what it promises to one is tests/unit/test_leases.py.
#include <gtest/gtest.h>

#include <atomic>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "channel/lease_table.h"

namespace datadist {
namespace {

constexpr LeaseContent kContent{{1}, {2}};
constexpr LeaseTable::Durations kLasting{std::chrono::minutes(1), std::chrono::minutes(1)};
constexpr LeaseTable::Durations kShort{std::chrono::milliseconds(10), std::chrono::milliseconds(10)};

// Whoever comes first ends a lease, and it ends once: a second time its blocks would be another request's.
TEST(LeaseTable, RacingThreadsEndEachLeaseOnce) {
  constexpr size_t kLeases = 400;
  LeaseTable table(std::chrono::minutes(10));
  std::vector<LeaseTable::Ticket> tickets;
  for (size_t i = 0; i < kLeases; ++i) {
    tickets.push_back(table.Grant(std::to_string(i), kContent, 1, kLasting).value());
  }
  std::vector<std::thread> threads;
  std::atomic<size_t> running{4};
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (const LeaseTable::Ticket &ticket : tickets) {
        (void)table.Renew({ticket.token}, false, "d");
        (void)table.held();
        (void)table.Revoke(LeaseTable::Revocable::kAll, std::chrono::seconds(0), 1);
        table.Release({ticket.token});
        EXPECT_EQ(table.Confirm(ticket.token, ticket.generation, kContent, "d"), LeaseVerdict::kGone);
      }
      --running;
    });
  }
  std::multiset<std::string> ended;
  while (running > 0) {
    for (const LeaseTable::Ended &lease : table.TakeEnded()) {
      ended.insert(lease.request_id);
    }
  }
  for (std::thread &thread : threads) {
    thread.join();
  }
  for (const LeaseTable::Ended &lease : table.TakeEnded()) {
    ended.insert(lease.request_id);
  }
  EXPECT_EQ(ended.size(), kLeases);
  EXPECT_EQ(std::set<std::string>(ended.begin(), ended.end()).size(), kLeases);
  EXPECT_EQ(table.TakeRefused().count, 4 * kLeases);
  EXPECT_EQ(table.held().leases, 0U);
  EXPECT_EQ(table.held().blocks, 0U);
}

LeaseTable::Ticket Grant(LeaseTable &table, const std::string &name) {
  return table.Grant(name, kContent, 1, kLasting).value();
}

// P needs the blocks itself: what a D reads right now goes last, and whoever reads on is told that it does not count.
TEST(LeaseTable, RevokesTheOldestThatNobodyReads) {
  using Revocable = LeaseTable::Revocable;
  const LeaseTable::Clock::duration any_age{};
  LeaseTable table(std::chrono::minutes(10));
  const auto pulled = Grant(table, "pulled");
  const auto waited_for = Grant(table, "waited for");
  const auto first = Grant(table, "first");
  const auto last = Grant(table, "last");
  EXPECT_TRUE(table.Renew({pulled.token}, true, "d").empty());
  EXPECT_TRUE(table.Renew({waited_for.token}, false, "d").empty());
  EXPECT_EQ(table.Revoke(Revocable::kUnclaimed, std::chrono::minutes(1), 9), 0U);
  EXPECT_EQ(table.Revoke(Revocable::kUnclaimed, any_age, 1), 1U);
  EXPECT_EQ(table.Confirm(first.token, first.generation, kContent, "d"), LeaseVerdict::kGone);
  EXPECT_EQ(table.Confirm(last.token, last.generation, kContent, "d"), LeaseVerdict::kHeld);
  EXPECT_EQ(table.Revoke(Revocable::kUnclaimed, any_age, 9), 1U);
  EXPECT_FALSE(table.RevokeIdle(pulled.token));
  EXPECT_EQ(table.Revoke(Revocable::kIdle, any_age, 9), 1U);
  EXPECT_EQ(table.Confirm(waited_for.token, waited_for.generation, kContent, "d"), LeaseVerdict::kGone);
  EXPECT_EQ(table.held().leases, 1U);
  EXPECT_TRUE(table.Renew({pulled.token}, false, "d").empty());
  EXPECT_TRUE(table.RevokeIdle(pulled.token));
  for (const LeaseTable::Ended &lease : table.TakeEnded()) {
    EXPECT_EQ(lease.why, LeaseTable::End::kRevoked);
  }
  EXPECT_EQ(table.held().blocks, 0U);
}

// Each rank of a D confirms for itself.
TEST(LeaseTable, IsServedOnce) {
  LeaseTable table(std::chrono::minutes(10));
  const auto served = table.Grant("served", kContent, 3, kLasting).value();
  const auto left = table.Grant("left", kContent, 5, kLasting).value();
  for (int rank = 0; rank < 2; ++rank) {
    EXPECT_EQ(table.Confirm(served.token, served.generation, kContent, "d"), LeaseVerdict::kHeld);
  }
  EXPECT_EQ(table.Confirm(left.token, left.generation, {{9}, {9}}, "d"), LeaseVerdict::kOtherPrompt);
  const LeaseTable::Amount taken = table.TakeServed();
  EXPECT_EQ(taken.leases, 1U);
  EXPECT_EQ(taken.blocks, 3U);
  EXPECT_EQ(table.Confirm(served.token, served.generation, kContent, "d"), LeaseVerdict::kHeld);
  EXPECT_EQ(table.TakeServed().leases, 0U);
}

// Whoever asks for changes alone must not miss one, nor be told of one in each step.
TEST(LeaseTable, ChangesAreWhateverWouldBeToldAnew) {
  LeaseTable::Clock::time_point now{};
  LeaseTable table(std::chrono::minutes(10), [&now] { return now; });
  uint64_t last = table.Changes();
  const auto has_changed = [&] { return std::exchange(last, table.Changes()) != last; };
  EXPECT_FALSE(has_changed());
  const auto held = Grant(table, "held");
  const auto left = table.Grant("left", kContent, 1, kShort).value();
  EXPECT_TRUE(has_changed());
  EXPECT_EQ(table.Confirm(held.token, held.generation, kContent, "d"), LeaseVerdict::kHeld);
  EXPECT_TRUE(has_changed());
  EXPECT_EQ(table.Confirm(held.token, held.generation, kContent, "d"), LeaseVerdict::kHeld);
  EXPECT_FALSE(has_changed()) << "it was served before";
  EXPECT_EQ(table.Confirm(left.token, 99, kContent, "d"), LeaseVerdict::kGone);
  EXPECT_TRUE(has_changed());
  now += std::chrono::milliseconds(500);
  EXPECT_TRUE(has_changed()) << "one has run out";
  (void)table.Renew({held.token}, true, "d");
  (void)table.TakeEnded();
  (void)table.TakeRefused();
  (void)table.TakeServed();
  now += std::chrono::milliseconds(499);
  EXPECT_FALSE(has_changed());
  now += std::chrono::milliseconds(1);
  EXPECT_TRUE(has_changed()) << "the oldest is a second old";
  table.Release({held.token});
  EXPECT_TRUE(has_changed());
  now += std::chrono::minutes(1);
  EXPECT_FALSE(has_changed()) << "none is held";
}

TEST(LeaseTable, TheOldestIsTheFirstThatIsHeld) {
  LeaseTable::Clock::time_point now{};
  LeaseTable table(std::chrono::minutes(10), [&now] { return now; });
  EXPECT_EQ(table.OldestAge(), std::chrono::seconds(0));
  const auto first = Grant(table, "first");
  now += std::chrono::seconds(2);
  const auto last = Grant(table, "last");
  now += std::chrono::seconds(1);
  EXPECT_EQ(table.OldestAge(), std::chrono::seconds(3));
  table.Release({first.token});
  EXPECT_EQ(table.OldestAge(), std::chrono::seconds(1));
  table.Release({last.token});
  EXPECT_EQ(table.OldestAge(), std::chrono::seconds(0));
}

TEST(LeaseTable, OneThatNobodyAskedForIsShort) {
  LeaseTable::Clock::time_point now{};
  LeaseTable table(std::chrono::minutes(10), [&now] { return now; });
  const LeaseTable::Durations durations{std::chrono::seconds(1), std::chrono::seconds(30)};
  const auto claimed = table.Grant("claimed", kContent, 1, durations).value();
  (void)table.Grant("left", kContent, 1, durations);
  EXPECT_TRUE(table.Renew({claimed.token}, false, "d").empty());
  now += std::chrono::seconds(1);
  const std::vector<LeaseTable::Ended> left = table.TakeEnded();
  ASSERT_EQ(left.size(), 1U);
  EXPECT_EQ(left[0].why, LeaseTable::End::kUnclaimed);
  now += std::chrono::seconds(29);
  const std::vector<LeaseTable::Ended> silent = table.TakeEnded();
  ASSERT_EQ(silent.size(), 1U);
  EXPECT_EQ(silent[0].why, LeaseTable::End::kExpired);
}

// For who looks for the D whose answer was lost: of the first refusals, of requests that have ended not long ago.
TEST(LeaseTable, TellsWhoAskedForWhat) {
  LeaseTable table(std::chrono::minutes(10));
  const auto lease = Grant(table, "r");
  EXPECT_TRUE(table.Renew({lease.token}, false, "first").empty());
  EXPECT_TRUE(table.Renew({lease.token}, false, "second").empty());
  const LeaseContent other{{3}, {2}};
  EXPECT_EQ(table.Confirm(lease.token, lease.generation, other, "third"), LeaseVerdict::kOtherPrompt);
  table.Release({lease.token});
  const std::vector<LeaseTable::Ended> ended = table.TakeEnded();
  ASSERT_EQ(ended.size(), 1U);
  EXPECT_EQ(ended[0].asked_by, "second");
  EXPECT_EQ(table.Confirm(lease.token, lease.generation, kContent, "fourth"), LeaseVerdict::kGone);
  EXPECT_EQ(table.Confirm({9}, 1, kContent, "fifth"), LeaseVerdict::kGone);
  const LeaseTable::Refused refused = table.TakeRefused();
  EXPECT_EQ(refused.count, 3U);
  ASSERT_EQ(refused.first.size(), 3U);
  EXPECT_EQ(refused.first[0].request_id + refused.first[0].asked_by, "rthird");
  EXPECT_EQ(refused.first[1].request_id + refused.first[1].asked_by, "rfourth");
  EXPECT_EQ(refused.first[2].request_id + refused.first[2].asked_by, "fifth");
  EXPECT_EQ(table.TakeRefused().count, 0U);
}

TEST(LeaseTable, RemembersNoMoreThanItMay) {
  LeaseTable table(std::chrono::minutes(10));
  const auto oldest = Grant(table, "oldest");
  const auto next = Grant(table, "next");
  table.Release({oldest.token, next.token});
  for (size_t i = 1; i < LeaseTable::kMostRemembered; ++i) {
    table.Release({Grant(table, "other").token});
  }
  for (size_t i = 0; i < LeaseTable::kMostRefusals; ++i) {
    (void)table.Confirm(oldest.token, oldest.generation, kContent, "d");
    (void)table.Confirm(next.token, next.generation, kContent, "d");
  }
  const LeaseTable::Refused refused = table.TakeRefused();
  EXPECT_EQ(refused.count, 2 * LeaseTable::kMostRefusals);
  ASSERT_EQ(refused.first.size(), LeaseTable::kMostRefusals);
  EXPECT_EQ(refused.first[0].request_id, "");
  EXPECT_EQ(refused.first[1].request_id, "next");
}

// What a confirmation proves: no lease that was confirmed had been told of as ended before.
TEST(LeaseTable, ConfirmsNothingWhoseEndWasTold) {
  std::atomic<int64_t> now{0};
  LeaseTable table(std::chrono::minutes(10),
                   [&now] { return LeaseTable::Clock::time_point(std::chrono::milliseconds(now.load())); });
  for (int round = 0; round < 300; ++round) {
    const LeaseTable::Ticket ticket = table.Grant("r", kContent, 1, kShort).value();
    std::atomic<bool> told{false};
    std::thread steps([&] {
      now += 10;
      while (table.TakeEnded().empty()) {
      }
      told = true;
    });
    bool held = true;
    while (held) {
      const bool was_told = told;
      held = table.Confirm(ticket.token, ticket.generation, kContent, "d") == LeaseVerdict::kHeld;
      EXPECT_FALSE(was_told && held);
    }
    steps.join();
  }
}

}  // namespace
}  // namespace datadist
