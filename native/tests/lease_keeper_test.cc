// The keeper as several threads use it, and its end; what it says to a P is tests/unit/test_keeper.py.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <set>
#include <thread>
#include <vector>

#include "channel/lease_keeper.h"
#include "support/channel_ends.h"

namespace datadist::testing {
namespace {

constexpr std::chrono::minutes kLease{5};

LeaseKeeper::Grantor At(const ServerEnd &server) { return {"127.0.0.1", server.port()}; }

std::unique_ptr<LeaseKeeper> Keeper(const LeaseKeeperLimits &limits = {}) {
  return std::move(LeaseKeeper::Create(kContentVersion, Anybody(), kLong, limits)).value();
}

// Yields the core until it is so: for what another thread does.
template <typename Condition>
bool Eventually(const Condition &condition) {
  const auto end = std::chrono::steady_clock::now() + kLong;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) {
      return false;
    }
    std::this_thread::yield();
  }
  return true;
}

TEST(LeaseKeeper, RacingThreadsReleaseEachLeaseOnce) {
  constexpr size_t kLeases = 200;
  constexpr size_t kUsers = 4;
  const ServerEnd server;
  const auto keeper = Keeper();
  std::vector<LeaseToken> tokens;
  for (size_t i = 0; i < kLeases; ++i) {
    tokens.push_back(server.Grant(std::to_string(i)).token);
  }
  std::atomic<size_t> holding{0};
  std::vector<std::thread> users;
  for (size_t i = 0; i < kUsers; ++i) {
    users.emplace_back([&] {
      for (const LeaseToken &token : tokens) {
        EXPECT_TRUE(keeper->Hold(At(server), token, kLease, true));
      }
      ++holding;
      // None is released by its last user while another has yet to come.
      EXPECT_TRUE(Eventually([&] { return holding == kUsers; }));
      for (const LeaseToken &token : tokens) {
        EXPECT_NE(keeper->StandingOf(token), LeaseKeeper::Standing::kGone);
        keeper->Pulls(token, kLease);
        keeper->Release(token);
      }
    });
  }
  for (std::thread &user : users) {
    user.join();
  }
  EXPECT_TRUE(Eventually([&] { return keeper->size() == 0; }));
  std::multiset<std::string> ended;
  for (const LeaseTable::Ended &lease : server.leases->TakeEnded()) {
    EXPECT_EQ(lease.why, LeaseTable::End::kReleased);
    ended.insert(lease.request_id);
  }
  EXPECT_EQ(ended.size(), kLeases);
}

TEST(LeaseKeeper, ClosesUnderItsUsers) {
  const ServerEnd server;
  const auto keeper = Keeper();
  std::atomic<bool> closed{false};
  std::thread user([&] {
    while (!closed) {
      const LeaseToken token = server.Grant().token;
      (void)keeper->Hold(At(server), token, kLease, false);
      (void)keeper->StandingOf(token);
      keeper->Release(token);
    }
  });
  std::thread other_closer([&] { keeper->Close(); });
  keeper->Close();
  other_closer.join();
  closed = true;
  user.join();
}

// However short it is said to be: a forged ticket must not make us flood whom it names, nor keep the lock for ever.
TEST(LeaseKeeper, RenewsNoFasterThanItMay) {
  const BareServer server;
  const auto keeper = Keeper();
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_TRUE(keeper->Hold({"127.0.0.1", server.port()}, LeaseToken{1}, std::chrono::seconds(0), true));
  const Fd connection = server.Welcome();
  constexpr int kRenewals = 10;
  for (int i = 0; i < kRenewals; ++i) {
    const Result<Frame> request = ReceiveRequest(connection);
    ASSERT_TRUE(request.ok());
    EXPECT_EQ(request.value().type, MessageType::kRenew);
  }
  EXPECT_GE(std::chrono::steady_clock::now() - begin, (kRenewals - 1) * std::chrono::milliseconds(10));
  EXPECT_EQ(keeper->size(), 1U);
}

}  // namespace
}  // namespace datadist::testing
