// The lease table as several threads use it; what it promises to one is tests/unit/test_leases.py.
#include <gtest/gtest.h>

#include <atomic>
#include <set>
#include <thread>
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
        (void)table.Renew({ticket.token}, false);
        (void)table.held();
        (void)table.Revoke(LeaseTable::Revocable::kAll, std::chrono::seconds(0), 1);
        table.Release({ticket.token});
        EXPECT_EQ(table.Confirm(ticket.token, ticket.generation, kContent), LeaseVerdict::kGone);
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
  EXPECT_EQ(table.TakeRefused()[static_cast<size_t>(LeaseVerdict::kGone)], 4 * kLeases);
  EXPECT_EQ(table.held().leases, 0U);
  EXPECT_EQ(table.held().blocks, 0U);
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
      held = table.Confirm(ticket.token, ticket.generation, kContent) == LeaseVerdict::kHeld;
      EXPECT_FALSE(was_told && held);
    }
    steps.join();
  }
}

}  // namespace
}  // namespace datadist
