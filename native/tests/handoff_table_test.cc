// The table of hand-offs: what each of its users may bring about, and that it is bounded.
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "channel/handoff_table.h"

namespace datadist {
namespace {

using Blob = HandoffTable::Blob;

constexpr LeaseToken kToken{1};
constexpr LeaseToken kOther{2};
constexpr RankId kRank{0, 1};

std::unique_ptr<HandoffTable> Table(size_t most = HandoffTable::kMostLive) {
  return std::move(HandoffTable::Create(most)).value();
}

LeaseToken TokenOf(size_t number) {
  LeaseToken token{9};
  token[1] = static_cast<uint8_t>(number);
  token[2] = static_cast<uint8_t>(number >> 8U);
  return token;
}

std::string MarkOf(HandoffTable &table, const RankId &rank = kRank) {
  const ProgressMark mark = table.Look(kToken, rank, 0).mark;
  std::string text = std::to_string(mark.epoch) + ": " + std::to_string(mark.base) + " " + std::to_string(mark.next);
  for (const uint8_t byte : mark.layers) {
    text += " " + std::to_string(byte);
  }
  return text;
}

struct Heard : HandoffListener {
  void OnHandoffNews(const LeaseToken &token) override { tokens.push_back(token); }
  std::vector<LeaseToken> tokens;
};

TEST(HandoffTable, GoesFromPromiseToLease) {
  const auto table = Table();
  EXPECT_EQ(table->Look(kToken, {}, 0).state, HandoffState::kUnknown);
  EXPECT_EQ(table->Look(kToken, {}, 0).stamp, 0U);
  ASSERT_TRUE(table->Promise(kToken, "r"));
  const HandoffNews promised = table->Look(kToken, {}, 0);
  EXPECT_EQ(promised.state, HandoffState::kPromised);
  EXPECT_EQ(promised.version, 0U);
  EXPECT_NE(promised.stamp, 0U) << "a promise is news to who saw nothing";
  ASSERT_TRUE(table->Begin(kToken, 1, {1}).ok());
  ASSERT_TRUE(table->Begin(kToken, 2, {1, 2}).ok());
  const HandoffNews begun = table->Look(kToken, {}, 1);
  EXPECT_EQ(begun.state, HandoffState::kBegun);
  EXPECT_EQ(begun.epoch, 2U);
  EXPECT_EQ(begun.version, 2U);
  EXPECT_EQ(begun.blob, (Blob{1, 2}));
  EXPECT_FALSE(table->Look(kToken, {}, 2).blob.has_value());
  EXPECT_TRUE(table->Seal(kToken, 2, {3}).value());
  EXPECT_EQ(table->Look(kToken, {}, 2).state, HandoffState::kSealed);
  EXPECT_EQ(table->Look(kToken, {}, 2).blob, Blob{3});
  EXPECT_FALSE(table->Seal(kToken, 2, {}).value());
  ASSERT_TRUE(table->Begin(kToken, 3, {}).ok());
  EXPECT_EQ(table->Look(kToken, {}, 2).epoch, 2U) << "what is sealed does not begin again";
  EXPECT_EQ(table->live(), 1U);
  table->Forget({kToken, kOther});
  EXPECT_EQ(table->live(), 0U);
  const HandoffNews gone = table->Look(kToken, {}, 3);
  EXPECT_EQ(gone.state, HandoffState::kEnded);
  EXPECT_EQ(gone.version, 4U);
  EXPECT_EQ(gone.blob, Blob{});
  EXPECT_EQ(gone.reason, "its lease has ended");
}

TEST(HandoffTable, EndsOnceAndSaysWhyInOneLine) {
  const auto table = Table();
  ASSERT_TRUE(table->Promise(kToken, "r"));
  ASSERT_TRUE(table->Begin(kToken, 1, {1}).ok());
  table->Report(kRank, {{kToken, {1, 0, 4, {}}}});
  table->Forget({kToken});
  EXPECT_EQ(table->Look(kToken, {}, 0).state, HandoffState::kBegun) << "it has no lease that could have ended";
  table->End(kToken, "aborted\nP: a line of its own");
  table->End(kToken, "again");
  table->End(kOther, "never was");
  EXPECT_EQ(table->live(), 0U);
  const HandoffNews ended = table->Look(kToken, kRank, 0);
  EXPECT_EQ(ended.reason, "aborted P: a line of its own");
  EXPECT_EQ(ended.mark.next, 0U);
  table->Report(kRank, {{kToken, {1, 0, 5, {}}}});
  EXPECT_EQ(table->Look(kToken, kRank, 0).stamp, ended.stamp);
  ASSERT_TRUE(table->Begin(kToken, 1, {1}).ok());
  EXPECT_FALSE(table->Seal(kToken, 1, {1}).value());
  EXPECT_EQ(table->Look(kToken, {}, 0).state, HandoffState::kEnded);
}

TEST(HandoffTable, IsBounded) {
  const auto table = Table(2);
  ASSERT_TRUE(table->Promise(kToken, "r"));
  EXPECT_FALSE(table->Promise(kToken, "r"));
  ASSERT_TRUE(table->Promise(kOther, "r"));
  EXPECT_FALSE(table->Promise(TokenOf(0), "r"));
  table->End(kToken, "first");
  EXPECT_FALSE(table->Promise(kToken, "r")) << "who is late would be told of another's";
  for (size_t i = 0; i < HandoffTable::kMostRemembered; ++i) {
    EXPECT_EQ(table->Look(kToken, {}, 0).state, HandoffState::kEnded);
    ASSERT_TRUE(table->Promise(TokenOf(i), "r"));
    table->End(TokenOf(i), "");
  }
  EXPECT_EQ(table->Look(kToken, {}, 0).state, HandoffState::kUnknown) << "only so many are remembered";
  EXPECT_EQ(table->Look(TokenOf(0), {}, 0).state, HandoffState::kEnded);
  EXPECT_FALSE(table->Begin(kOther, 1, Blob(kMaxHandoffBlob + 1)).ok());
  EXPECT_FALSE(table->Seal(kOther, 1, Blob(kMaxHandoffBlob + 1)).ok());
  EXPECT_TRUE(table->Seal(kOther, 1, Blob(kMaxHandoffBlob)).value());
}

TEST(HandoffTable, KnowsSoManyRanks) {
  const auto table = Table();
  ASSERT_TRUE(table->Promise(kToken, "r"));
  for (size_t i = 0; i <= HandoffTable::kMostRanks; ++i) {
    table->Report({static_cast<uint16_t>(i / 64), static_cast<uint16_t>(i % 64)}, {{kToken, {1, 2, 3, {}}}});
  }
  EXPECT_EQ(MarkOf(*table, {63, 63}), "1: 2 3");
  EXPECT_EQ(MarkOf(*table, {64, 0}), "0: 0 0");
}

// Reports come over whichever connection, some twice and some late: what a D has been told it may read stays so, until
// the blocks are others.
TEST(HandoffTable, MarksDoNotGoBack) {
  const auto table = Table();
  const auto report = [&](const ProgressMark &mark) {
    table->Report(kRank, {{kOther, mark}, {kToken, mark}});
    return MarkOf(*table);
  };
  EXPECT_EQ(report({7, 0, 16, {1}}), "0: 0 0") << "of nobody";
  ASSERT_TRUE(table->Promise(kToken, "r"));
  EXPECT_EQ(report({7, 0, 16, {1}}), "7: 0 16 1") << "ahead of what the scheduler told";
  EXPECT_EQ(report({7, 0, 16, {2, 1}}), "7: 0 16 3 1");
  EXPECT_EQ(report({7, 0, 16, {1}}), "7: 0 16 3 1");
  EXPECT_EQ(report({7, 16, 16, {}}), "7: 16 16");
  EXPECT_EQ(report({7, 0, 16, {1}}), "7: 16 16") << "late";
  EXPECT_EQ(report({7, 16, 32, {}}), "7: 16 32");
  EXPECT_EQ(report({7, 16, 16, {}}), "7: 16 32") << "late";
  EXPECT_EQ(report({7, 16, 32, {4}}), "7: 16 32 4");
  EXPECT_EQ(report({7, 16, 24, {8}}), "7: 16 32 4") << "late, and of fewer tokens";
  EXPECT_EQ(report({7, 20, 40, {}}), "7: 20 40") << "layers are those of its own tokens";
  EXPECT_EQ(report({6, 50, 60, {1}}), "7: 20 40") << "of blocks that are others' by now";
  EXPECT_EQ(report({8, 0, 8, {}}), "8: 0 8");
  EXPECT_EQ(MarkOf(*table, {0, 0}), "0: 0 0");
}

TEST(HandoffTable, StampsCountWhatTheAskerSees) {
  const auto table = Table();
  ASSERT_TRUE(table->Promise(kToken, "r"));
  const auto stamps = [&] {
    return std::array<uint64_t, 3>{table->Look(kToken, {}, 0).stamp, table->Look(kToken, kRank, 0).stamp,
                                   table->Look(kToken, RankId{1, 1}, 0).stamp};
  };
  const auto promised = stamps();
  table->Report(kRank, {{kToken, {1, 0, 4, {1}}}});
  const auto moved = stamps();
  EXPECT_EQ(moved[0], promised[0]);
  EXPECT_NE(moved[1], promised[1]);
  EXPECT_EQ(moved[2], promised[2]);
  table->Report(kRank, {{kToken, {1, 0, 4, {1}}}});
  EXPECT_EQ(stamps(), moved) << "heard before";
  ASSERT_TRUE(table->Begin(kToken, 1, {}).ok());
  for (size_t i = 0; i < moved.size(); ++i) {
    EXPECT_GT(stamps()[i], moved[i]);
  }
}

TEST(HandoffTable, IsRenewedAndWithdrawnUntilItIsSealed) {
  const auto table = Table();
  ASSERT_TRUE(table->Promise(kToken, "r"));
  EXPECT_FALSE(table->IsAwaited(kToken));
  EXPECT_EQ(table->Renewable({kOther, kToken}), std::vector<LeaseToken>{kToken});
  EXPECT_TRUE(table->IsAwaited(kToken));
  EXPECT_FALSE(table->IsAwaited(kOther));
  EXPECT_FALSE(table->IsWithdrawn(kToken));
  EXPECT_EQ(table->Withdraw({kOther, kToken}), std::vector<LeaseToken>{kToken});
  EXPECT_TRUE(table->IsWithdrawn(kToken));
  EXPECT_FALSE(table->Seal(kToken, 1, {}).value()) << "the lease would be nobody's";
  ASSERT_TRUE(table->Promise(kOther, "r"));
  EXPECT_FALSE(table->IsAwaited(kOther));
  (void)table->Look(kOther, {}, 0);
  EXPECT_TRUE(table->IsAwaited(kOther));
  EXPECT_TRUE(table->Seal(kOther, 1, {}).value());
  EXPECT_TRUE(table->Renewable({kOther}).empty());
  EXPECT_TRUE(table->Withdraw({kOther}).empty()) << "the lease is to be released";
}

TEST(HandoffTable, TakesOneOfferOfEachPair) {
  const auto table = Table();
  EXPECT_EQ(table->Offer(kToken, kRank, 7).status().code(), llm_datadist::LLM_PARAM_INVALID) << "not promised";
  ASSERT_TRUE(table->Promise(kToken, "r"));
  EXPECT_TRUE(table->Offer(kToken, kRank, 7).value());
  EXPECT_FALSE(table->Offer(kToken, kRank, 7).value()) << "sent again";
  EXPECT_TRUE(table->Offer(kToken, {0, 9}, 7).value());
  EXPECT_TRUE(table->Offer(kToken, kRank, 8).value());
  EXPECT_EQ(table->Look(kToken, kRank, 0, 7).delivery.state, DeliveryState::kOffered);
  EXPECT_EQ(table->Look(kToken, kRank, 0).delivery.state, DeliveryState::kNone);
  EXPECT_EQ(table->Look(kToken, {}, 0, 7).delivery.state, DeliveryState::kNone);
  ASSERT_TRUE(table->Seal(kToken, 1, {}).value());
  EXPECT_FALSE(table->Offer(kToken, kRank, 9).ok()) << "there is nothing to hide any more";
  ASSERT_TRUE(table->Promise(kOther, "r"));
  (void)table->Withdraw({kOther});
  EXPECT_FALSE(table->Offer(kOther, kRank, 7).ok()) << "withdrawn";
}

TEST(HandoffTable, OffersOfOneHandoffAreBounded) {
  const auto table = Table();
  ASSERT_TRUE(table->Promise(kToken, "r"));
  for (uint64_t offer_id = 1; offer_id <= HandoffTable::kMostRanks; ++offer_id) {
    ASSERT_TRUE(table->Offer(kToken, kRank, offer_id).value());
  }
  EXPECT_FALSE(table->Offer(kToken, kRank, HandoffTable::kMostRanks + 1).ok());
  EXPECT_FALSE(table->Offer(kToken, kRank, 1).value()) << "known";
}

TEST(HandoffTable, TellsOfDeliveriesInTheirOrder) {
  const auto table = Table();
  ASSERT_TRUE(table->Promise(kToken, "r"));
  const auto now = [&] { return table->Look(kToken, kRank, 0, 7); };
  const auto deliver = [&](DeliveryState state, uint32_t epoch, uint64_t bytes) {
    const uint64_t before = now().stamp;
    table->Deliver(kToken, kRank, 7, {state, epoch, bytes, bytes, 1, "a\nb"});
    return now().stamp != before;
  };
  EXPECT_FALSE(deliver(DeliveryState::kRunning, 1, 1)) << "not offered";
  EXPECT_EQ(now().delivery.state, DeliveryState::kNone);
  ASSERT_TRUE(table->Offer(kToken, kRank, 7).value());
  EXPECT_TRUE(deliver(DeliveryState::kRunning, 1, 10));
  EXPECT_FALSE(deliver(DeliveryState::kRunning, 1, 9)) << "older";
  EXPECT_FALSE(deliver(DeliveryState::kOffered, 2, 0));
  EXPECT_TRUE(deliver(DeliveryState::kDone, 1, 20));
  EXPECT_FALSE(deliver(DeliveryState::kRunning, 1, 30)) << "all was written";
  EXPECT_TRUE(deliver(DeliveryState::kRunning, 2, 5)) << "P was preempted: from the start";
  EXPECT_FALSE(deliver(DeliveryState::kDone, 1, 20)) << "of the earlier epoch";
  EXPECT_EQ(now().delivery.bytes, 5U);
  const uint64_t others = table->Look(kToken, kRank, 0).stamp;
  EXPECT_TRUE(deliver(DeliveryState::kFailed, 2, 5));
  EXPECT_EQ(table->Look(kToken, kRank, 0).stamp, others) << "no news for who asks for something else";
  EXPECT_EQ(now().delivery.reason.find('\n'), std::string::npos);
  EXPECT_FALSE(deliver(DeliveryState::kDone, 3, 50)) << "a failure is the end";
  // Progress of the rank is no news for who takes what it writes.
  const uint64_t stamp = now().stamp;
  table->Report(kRank, {{kToken, {1, 0, 4, {}}}});
  EXPECT_EQ(now().stamp, stamp);
  EXPECT_EQ(now().mark.next, 0U);
  table->End(kToken, "");
  EXPECT_EQ(now().delivery.state, DeliveryState::kNone);
}

TEST(HandoffTable, TellsItsListenerOfNewsOnly) {
  const auto table = Table();
  auto heard = std::make_shared<Heard>();
  table->SetListener(heard);
  ASSERT_TRUE(table->Promise(kToken, "r"));
  EXPECT_FALSE(table->Promise(kToken, "r"));
  ASSERT_TRUE(table->Begin(kToken, 1, {}).ok());
  ASSERT_TRUE(table->Begin(kOther, 1, {}).ok());
  table->Report(kRank, {{kToken, {1, 0, 4, {}}}, {kOther, {1, 0, 4, {}}}});
  table->Report(kRank, {{kToken, {1, 0, 4, {}}}});
  EXPECT_EQ(heard->tokens, std::vector<LeaseToken>(3, kToken));
  EXPECT_TRUE(table->Seal(kToken, 1, {}).value());
  table->Forget({kToken});
  table->End(kToken, "");
  EXPECT_EQ(heard->tokens.size(), 5U);
  heard.reset();
  EXPECT_TRUE(table->Promise(kOther, "r")) << "a listener that has gone hears nothing";
}

TEST(HandoffTable, RacingThreadsEndEachOnce) {
  constexpr size_t kRows = 400;
  const auto table = Table();
  for (size_t i = 0; i < kRows; ++i) {
    ASSERT_TRUE(table->Promise(TokenOf(i), std::to_string(i)));
  }
  std::atomic<size_t> sealed{0};
  std::atomic<size_t> withdrawn{0};
  std::vector<std::thread> threads;
  for (uint16_t rank = 0; rank < 4; ++rank) {
    threads.emplace_back([&, rank] {
      for (size_t i = 0; i < kRows; ++i) {
        const LeaseToken token = TokenOf(i);
        EXPECT_TRUE(table->Begin(token, 1, Blob(100)).ok());
        table->Report({0, rank}, {{token, {1, 0, static_cast<uint32_t>(i), {1}}}});
        (void)table->Look(token, RankId{0, rank}, 0);
        (void)table->Renewable({token});
        withdrawn += i % 2 == rank % 2 ? table->Withdraw({token}).size() : 0;
        sealed += table->Seal(token, 1, {}).value() ? 1 : 0;
        table->Forget({token});
        table->End(token, "");
      }
    });
  }
  for (std::thread &thread : threads) {
    thread.join();
  }
  EXPECT_EQ(table->live(), 0U);
  EXPECT_LE(sealed, kRows);
  for (size_t i = 0; i < kRows; ++i) {
    EXPECT_EQ(table->Look(TokenOf(i), {}, 0).state, HandoffState::kEnded);
  }
}

}  // namespace
}  // namespace datadist
