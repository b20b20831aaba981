// AWAIT and REPORT over a channel: who is answered when, what a hand-off is to RENEW and RELEASE, and what waiting costs.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "support/channel_ends.h"

namespace datadist::testing {
namespace {

using std::chrono::milliseconds;

constexpr LeaseToken kToken{1};
constexpr LeaseToken kOther{2};
constexpr RankId kRank{0, 1};

Await Patient(const LeaseToken &token, const HandoffNews &seen = {}, std::optional<RankId> rank = {}) {
  return {token, rank, seen.version, seen.stamp, kMaxPatienceMs};
}

HandoffNews NewsOf(const ChannelAnswer &answer) {
  const auto *const news = std::get_if<HandoffNews>(&answer.answer);
  EXPECT_NE(news, nullptr) << (std::holds_alternative<NoAnswer>(answer.answer)
                                   ? std::get<NoAnswer>(answer.answer).error
                                   : "another answer");
  return news != nullptr ? *news : HandoffNews{};
}

ReportProgress Progress(const ServerEnd &server, const LeaseToken &token, uint32_t next, const RankId &rank = kRank) {
  return {server.handoffs->key(), rank, {{token, {1, 0, next, {1}}}}};
}

// All that a client sent before on its connection has been taken in.
void Settle(ClientEnd &client, const ServerEnd &server) { EXPECT_EQ(client.Failure(server.port()), ""); }

TEST(ChannelHandoff, WhoSawLessIsAnsweredAtOnce) {
  const ServerEnd server;
  ClientEnd client;
  ASSERT_TRUE(server.handoffs->Promise(kToken, "r"));
  const HandoffNews promised = NewsOf(client.Ask(server.port(), Patient(kToken)));
  EXPECT_EQ(promised.state, HandoffState::kPromised);
  EXPECT_FALSE(promised.blob.has_value());
  ASSERT_TRUE(server.handoffs->Begin(kToken, 5, {1, 2}).ok());
  const HandoffNews begun = NewsOf(client.Ask(server.port(), Patient(kToken, promised)));
  EXPECT_EQ(begun.epoch, 5U);
  EXPECT_EQ(begun.blob, (std::vector<uint8_t>{1, 2}));
  // The stamp is that of another asker; the version says that the end has not been seen.
  ASSERT_TRUE(server.handoffs->Seal(kToken, 5, {3}).value());
  HandoffNews seen = NewsOf(client.Ask(server.port(), Patient(kToken)));
  seen.version = begun.version;
  BareClient asker(server.port());
  ASSERT_TRUE(asker.Greet());
  ASSERT_TRUE(asker.Send(MessageType::kAwait, Encode(Patient(kToken, seen)), 1).ok());
  ASSERT_TRUE(asker.Send(MessageType::kRenew, Encode(Renew{}), 2).ok());
  const Result<Frame> first = asker.Receive();
  ASSERT_TRUE(first.ok());
  EXPECT_EQ(first.value().seq, 1U);
  EXPECT_EQ(Decode<HandoffNews>(first.value().body).value().state, HandoffState::kSealed);
}

// Nothing is asked again: each change wakes who waits for it, and nobody else.
TEST(ChannelHandoff, WaitsForItsNews) {
  const ServerEnd server;
  ClientEnd client;
  const uint64_t early = client.Send(server.port(), Patient(kToken));
  const uint64_t other = client.Send(server.port(), Patient(kOther));
  Settle(client, server);
  ASSERT_TRUE(server.handoffs->Promise(kToken, "r"));
  const HandoffNews promised = NewsOf(client.Wait(early));
  EXPECT_EQ(promised.state, HandoffState::kPromised);
  EXPECT_TRUE(server.handoffs->IsAwaited(kToken));
  const uint64_t scheduler = client.Send(server.port(), Patient(kToken, promised));
  const uint64_t rank = client.Send(server.port(), Patient(kToken, promised, kRank));
  const uint64_t other_rank = client.Send(server.port(), Patient(kToken, promised, RankId{0, 2}));
  ClientEnd worker;
  EXPECT_TRUE(std::holds_alternative<Reported>(worker.Ask(server.port(), Progress(server, kToken, 8)).answer));
  const HandoffNews mark = NewsOf(client.Wait(rank));
  EXPECT_EQ(mark.mark.next, 8U);
  EXPECT_EQ(mark.mark.layers, std::vector<uint8_t>{1});
  EXPECT_FALSE(mark.blob.has_value());
  server.handoffs->End(kToken, "why");
  for (const uint64_t id : {scheduler, other_rank}) {
    const HandoffNews ended = NewsOf(client.Wait(id));
    EXPECT_EQ(ended.state, HandoffState::kEnded) << "no mark of another's has woken it";
    EXPECT_EQ(ended.reason, "why");
  }
  ASSERT_TRUE(server.handoffs->Promise(kOther, "r"));
  EXPECT_EQ(NewsOf(client.Wait(other)).state, HandoffState::kPromised);
}

TEST(ChannelHandoff, IsAnsweredWhenItsPatienceIsOver) {
  const ServerEnd server;
  ClientEnd client;
  const auto began = std::chrono::steady_clock::now();
  const HandoffNews unknown = NewsOf(client.Ask(server.port(), Await{kToken, {}, 0, 0, 200}));
  EXPECT_GE(std::chrono::steady_clock::now() - began, milliseconds(200));
  EXPECT_EQ(unknown.state, HandoffState::kUnknown);
  ASSERT_TRUE(server.handoffs->Promise(kToken, "r"));
  server.handoffs->End(kToken, "why");
  const HandoffNews ended = NewsOf(client.Ask(server.port(), Patient(kToken)));
  const HandoffNews again = NewsOf(client.Ask(server.port(), Await{kToken, {}, ended.version, ended.stamp, 0}));
  EXPECT_EQ(again.state, HandoffState::kEnded);
  EXPECT_EQ(again.stamp, ended.stamp);
  EXPECT_FALSE(again.blob.has_value());
}

// The caller's time is for the answer; P may take its patience before.
TEST(ChannelHandoff, TheClientsTimeBeginsWhenPatienceIsOver) {
  const ServerEnd server;
  ClientEnd client;
  const uint64_t sent = client.Send(server.port(), Patient(kToken), milliseconds(1));
  const BareServer silent;
  const ChannelAnswer none = client.Ask(silent.port(), Await{kToken, {}, 0, 0, 100}, milliseconds(100));
  EXPECT_TRUE(std::get<NoAnswer>(none.answer).timed_out);
  ASSERT_TRUE(server.handoffs->Promise(kToken, "r"));
  EXPECT_EQ(NewsOf(client.Wait(sent)).state, HandoffState::kPromised);
}

TEST(ChannelHandoff, IsRenewedAndReleasedAsALeaseWouldBe) {
  const ServerEnd server;
  ClientEnd client;
  const LeaseToken unknown{3};
  ASSERT_TRUE(server.handoffs->Promise(kToken, "promised"));
  ASSERT_TRUE(server.handoffs->Promise(kOther, "sealed"));
  const LeaseTable::Durations durations{std::chrono::minutes(5), std::chrono::minutes(5)};
  ASSERT_TRUE(server.leases->Grant("sealed", {}, 3, durations, kOther).ok());
  EXPECT_FALSE(server.leases->Grant("another", {}, 3, durations, kOther).ok());
  const auto renew = [&] {
    return std::get<Renewed>(client.Ask(server.port(), Renew{{kToken, kOther, unknown}}).answer).gone;
  };
  EXPECT_EQ(renew(), std::vector<LeaseToken>{unknown});
  ASSERT_TRUE(server.handoffs->Seal(kOther, 1, {}).value());
  EXPECT_EQ(renew(), std::vector<LeaseToken>{unknown});
  (void)client.Ask(server.port(), Release{{unknown, kToken, kOther}});
  EXPECT_TRUE(server.handoffs->IsWithdrawn(kToken));
  EXPECT_FALSE(server.handoffs->IsWithdrawn(kOther));
  EXPECT_EQ(server.leases->held().leases, 0U);
}

// Released in the moment in which its lease is granted: the grant that is not sealed is P's to take back.
TEST(ChannelHandoff, WhatIsReleasedBeforeItIsSealedIsWithdrawnNotReleased) {
  const ServerEnd server;
  ClientEnd client;
  ASSERT_TRUE(server.handoffs->Promise(kToken, "r"));
  const LeaseTable::Durations durations{std::chrono::minutes(5), std::chrono::minutes(5)};
  ASSERT_TRUE(server.leases->Grant("r", {}, 3, durations, kToken).ok());
  (void)client.Ask(server.port(), Release{{kToken}});
  EXPECT_FALSE(server.handoffs->Seal(kToken, 1, {}).value());
  EXPECT_EQ(server.leases->held().leases, 1U);
}

TEST(ChannelHandoff, OnlyAWorkerOfThatInstanceReports) {
  const ServerEnd server;
  const ServerEnd other;
  ASSERT_TRUE(server.handoffs->Promise(kToken, "r"));
  for (size_t i = 0; i < sizeof(HandoffKey); ++i) {
    ReportProgress forged = Progress(server, kToken, 8);
    forged.key[i] ^= 1U;
    BareClient stranger(server.port());
    ASSERT_TRUE(stranger.Greet());
    ASSERT_TRUE(stranger.Send(MessageType::kReport, Encode(forged)).ok());
    ASSERT_TRUE(stranger.IsCutOff());
  }
  EXPECT_EQ(server.handoffs->Look(kToken, kRank, 0).mark.next, 0U);
  EXPECT_NE(server.handoffs->key(), other.handoffs->key());
}

// Without a table of its caller's it has one that stays empty: a D learns that in its own time, and keeps its connection.
TEST(ChannelHandoff, AnInstanceThatHandsNothingOffKnowsNone) {
  const auto leases = std::make_shared<LeaseTable>(std::chrono::minutes(10));
  const auto server = std::move(ChannelServer::Create(Loopback(), TheGrantor(), Anybody(), leases)).value();
  ClientEnd client;
  EXPECT_EQ(NewsOf(client.Ask(server->port(), Await{kToken, {}, 0, 0, 0})).state, HandoffState::kUnknown);
}

TEST(ChannelHandoff, WhoWaitsForTooMuchLeaves) {
  ChannelLimits limits;
  limits.awaits_per_guest = 100;
  const ServerEnd server(limits);
  ClientEnd healthy;
  const uint64_t waits = healthy.Send(server.port(), Patient(kToken));
  BareClient greedy(server.port());
  ASSERT_TRUE(greedy.Greet());
  for (uint32_t i = 0; i < 100; ++i) {
    ASSERT_TRUE(greedy.Send(MessageType::kAwait, Encode(Patient(kToken)), i).ok());
  }
  ASSERT_TRUE(greedy.Send(MessageType::kRenew, Encode(Renew{}), 100).ok());
  ASSERT_TRUE(greedy.Receive().ok()) << "so many are allowed";
  ASSERT_TRUE(greedy.Send(MessageType::kAwait, Encode(Patient(kToken)), 101).ok());
  EXPECT_TRUE(greedy.IsCutOff());
  ASSERT_TRUE(server.handoffs->Promise(kToken, "r"));
  EXPECT_EQ(NewsOf(healthy.Wait(waits)).state, HandoffState::kPromised);
}

// More than may wait in all: whoever waits for the most makes room.
TEST(ChannelHandoff, WaitingIsNotFilledByOneGuest) {
  ChannelLimits limits;
  limits.awaits = 10;
  const ServerEnd server(limits);
  ClientEnd healthy;
  std::vector<uint64_t> waits = {healthy.Send(server.port(), Patient(kToken))};
  Settle(healthy, server);
  BareClient greedy(server.port());
  ASSERT_TRUE(greedy.Greet());
  for (uint32_t i = 0; i < 9; ++i) {
    ASSERT_TRUE(greedy.Send(MessageType::kAwait, Encode(Patient(kToken)), i).ok());
  }
  ASSERT_TRUE(greedy.Send(MessageType::kRenew, Encode(Renew{}), 100).ok());
  ASSERT_TRUE(greedy.Receive().ok());
  waits.push_back(healthy.Send(server.port(), Patient(kToken)));
  EXPECT_TRUE(greedy.IsCutOff());
  BareClient again(server.port());
  ASSERT_TRUE(again.Greet());
  for (uint32_t i = 0; i < 9; ++i) {
    ASSERT_TRUE(again.Send(MessageType::kAwait, Encode(Patient(kToken)), i).ok());
  }
  EXPECT_TRUE(again.IsCutOff()) << "it has the most itself";
  ASSERT_TRUE(server.handoffs->Promise(kToken, "r"));
  for (const uint64_t id : waits) {
    EXPECT_EQ(NewsOf(healthy.Wait(id)).state, HandoffState::kPromised);
  }
}

// What a guest waited for goes with it, or those that come after it would find no room.
TEST(ChannelHandoff, WaitingEndsWithItsGuest) {
  ChannelLimits limits;
  limits.awaits = 1;
  const ServerEnd server(limits);
  for (int i = 0; i < 20; ++i) {
    BareClient guest(server.port());
    ASSERT_TRUE(guest.Greet());
    ASSERT_TRUE(guest.Send(MessageType::kAwait, Encode(Patient(kToken))).ok());
    ASSERT_TRUE(guest.Send(MessageType::kRenew, Encode(Renew{}), 2).ok());
    ASSERT_TRUE(guest.Receive().ok());
    ASSERT_TRUE(guest.Send(MessageType::kRank, {}).ok());
    EXPECT_TRUE(guest.IsCutOff());
  }
  BareClient last(server.port());
  ASSERT_TRUE(last.Greet());
  ASSERT_TRUE(last.Send(MessageType::kAwait, Encode(Patient(kToken)), 7).ok());
  ASSERT_TRUE(last.Send(MessageType::kRenew, Encode(Renew{}), 8).ok());
  ASSERT_TRUE(last.Receive().ok());
  ASSERT_TRUE(server.handoffs->Promise(kToken, "r"));
  const Result<Frame> news = last.Receive();
  ASSERT_TRUE(news.ok());
  EXPECT_EQ(news.value().seq, 7U);
}

// Answers that nobody reads, though nothing was asked meanwhile, are bounded as all others.
TEST(ChannelHandoff, NewsThatNobodyReadsIsBounded) {
  ChannelLimits limits;
  limits.unsent = 4U << 20;
  limits.stuck = kLong * 10;
  const ServerEnd server(limits);
  ASSERT_TRUE(server.handoffs->Promise(kToken, "r"));
  const HandoffNews promised = server.handoffs->Look(kToken, {}, 0);
  BareClient guest(server.port());
  ASSERT_TRUE(guest.Greet());
  for (uint32_t i = 0; i < 64; ++i) {
    ASSERT_TRUE(guest.Send(MessageType::kAwait, Encode(Patient(kToken, promised)), i).ok());
  }
  ASSERT_TRUE(guest.Send(MessageType::kRenew, Encode(Renew{}), 100).ok());
  ASSERT_TRUE(guest.Receive().ok());
  ASSERT_TRUE(server.handoffs->Begin(kToken, 1, HandoffTable::Blob(kMaxHandoffBlob)).ok());
  // All has been sent by then, and the guest has read nothing.
  ClientEnd healthy;
  EXPECT_EQ(NewsOf(healthy.Ask(server.port(), Patient(kToken))).blob->size(), kMaxHandoffBlob);
  EXPECT_TRUE(guest.IsCutOff());
}

TEST(ChannelHandoff, ServersComeAndGoOverOneTable) {
  const auto leases = std::make_shared<LeaseTable>(std::chrono::minutes(10));
  const std::shared_ptr<HandoffTable> handoffs = std::move(HandoffTable::Create()).value();
  const auto serve = [&] {
    return std::move(ChannelServer::Create(Loopback(), TheGrantor(), Anybody(), leases, {}, handoffs)).value();
  };
  auto first = serve();
  const auto second = serve();
  first.reset();
  ClientEnd client;
  const uint64_t waits = client.Send(second->port(), Patient(kToken));
  EXPECT_EQ(client.Failure(second->port()), "");
  ASSERT_TRUE(handoffs->Promise(kToken, "r"));
  EXPECT_EQ(NewsOf(client.Wait(waits)).state, HandoffState::kPromised);
  second->Close();
  EXPECT_TRUE(handoffs->Begin(kToken, 1, {}).ok()) << "news that no server takes";
}

// A scheduler, the ranks' workers and several Ds at once: every D sees every hand-off through to its end, and what it is
// told of a rank never goes back.
TEST(ChannelHandoff, RacingEndsSeeEachOtherThrough) {
  constexpr uint8_t kRows = 40;
  constexpr uint32_t kSteps = 8;
  constexpr uint16_t kRanks = 2;
  const ServerEnd server;
  const auto token_of = [](uint8_t row) { return LeaseToken{7, row}; };
  std::vector<std::thread> threads;
  for (uint16_t rank = 0; rank < kRanks; ++rank) {
    threads.emplace_back([&, rank] {  // D's
      ClientEnd client;
      for (uint8_t row = 0; row < kRows; ++row) {
        HandoffNews seen;
        while (seen.state != HandoffState::kSealed && seen.state != HandoffState::kEnded && !::testing::Test::HasFailure()) {
          const HandoffNews news = NewsOf(client.Ask(server.port(), Patient(token_of(row), seen, RankId{0, rank})));
          EXPECT_NE(news.stamp, seen.stamp);
          EXPECT_GE(news.mark.next, seen.mark.next);
          EXPECT_GE(news.version, seen.version);
          seen = news;
        }
      }
    });
    threads.emplace_back([&, rank] {  // P's workers
      ClientEnd client;
      for (uint8_t row = 0; row < kRows; ++row) {
        for (uint32_t step = 1; step <= kSteps; ++step) {
          (void)client.Ask(server.port(), Progress(server, token_of(row), step, {0, rank}));
        }
      }
    });
  }
  threads.emplace_back([&] {  // P's scheduler
    for (uint8_t row = 0; row < kRows; ++row) {
      EXPECT_TRUE(server.handoffs->Promise(token_of(row), "r"));
      for (uint32_t step = 0; step < kSteps; ++step) {
        EXPECT_TRUE(server.handoffs->Begin(token_of(row), 1, HandoffTable::Blob(step)).ok());
      }
      if (row % 2 == 0) {
        EXPECT_TRUE(server.handoffs->Seal(token_of(row), 1, {1}).value());
      } else {
        server.handoffs->End(token_of(row), "why");
      }
    }
  });
  for (std::thread &thread : threads) {
    thread.join();
  }
  EXPECT_EQ(server.handoffs->live(), kRows / 2);
}

}  // namespace
}  // namespace datadist::testing
