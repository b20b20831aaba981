// OFFER, WATCH and DELIVER over a channel: a D offers blocks to a rank of P, which hears of each offer once, in order.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "channel/rank_orders.h"
#include "support/channel_ends.h"

namespace datadist::testing {
namespace {

constexpr LeaseToken kToken{1};
constexpr RankId kRank{0, 1};
constexpr uint64_t kOfferId = 77;

// With ranks (0, 0) and (0, 1), and a hand-off that was promised.
struct Instance : ServerEnd {
  explicit Instance(const ChannelLimits &limits = {}) : ServerEnd(limits) {
    EXPECT_TRUE(server->SetGeometries({{RankId{0, 0}, {1}}, {kRank, {1}}}).ok());
    EXPECT_TRUE(handoffs->Promise(kToken, "r"));
  }
  Watch Ask(uint64_t seen = 0, uint32_t patience_ms = kMaxPatienceMs, const RankId &rank = kRank) const {
    return {handoffs->key(), rank, seen, patience_ms};
  }
  Deliver Say(const Delivery &delivery) const { return {handoffs->key(), kRank, kToken, kOfferId, delivery}; }
};

Offer Blocks(std::vector<uint8_t> blob, uint64_t offer_id = kOfferId, const RankId &rank = kRank) {
  return {kToken, rank, offer_id, std::move(blob)};
}

Status StatusOf(const ChannelAnswer &answer) {
  const auto *const offered = std::get_if<Offered>(&answer.answer);
  EXPECT_NE(offered, nullptr);
  return offered != nullptr ? offered->status : Status::Ok();
}

Watched WatchedOf(const ChannelAnswer &answer) {
  const auto *const watched = std::get_if<Watched>(&answer.answer);
  EXPECT_NE(watched, nullptr);
  return watched != nullptr ? *watched : Watched{};
}

TEST(ChannelOffers, ReachTheRankThatTheyAreFor) {
  const Instance p;
  ClientEnd d;
  ClientEnd rank;
  ClientEnd other;
  const uint64_t early = rank.Send(p.port(), p.Ask());
  const uint64_t others = other.Send(p.port(), p.Ask(0, kMaxPatienceMs, {0, 0}));
  EXPECT_TRUE(StatusOf(d.Ask(p.port(), Blocks({4, 5}))).ok());
  const Watched first = WatchedOf(rank.Wait(early));
  EXPECT_EQ(first.number, 1U);
  EXPECT_EQ(first.token, kToken);
  EXPECT_EQ(first.offer_id, kOfferId);
  EXPECT_EQ(first.blob, (std::vector<uint8_t>{4, 5}));
  // What was not seen is told again; several come one by one.
  EXPECT_TRUE(StatusOf(d.Ask(p.port(), Blocks({6}, 78))).ok());
  EXPECT_EQ(WatchedOf(rank.Ask(p.port(), p.Ask(0))).number, 1U);
  const Watched second = WatchedOf(rank.Ask(p.port(), p.Ask(1)));
  EXPECT_EQ(second.number, 2U);
  EXPECT_EQ(second.offer_id, 78U);
  EXPECT_EQ(WatchedOf(rank.Ask(p.port(), p.Ask(2, 1))).number, 0U) << "patience is over";
  EXPECT_TRUE(StatusOf(d.Ask(p.port(), Blocks({7}, kOfferId, {0, 0}))).ok());
  EXPECT_EQ(WatchedOf(other.Wait(others)).blob, std::vector<uint8_t>{7});
}

TEST(ChannelOffers, SentAgainTheyAreOne) {
  const Instance p;
  ClientEnd d;
  ClientEnd rank;
  EXPECT_TRUE(StatusOf(d.Ask(p.port(), Blocks({4}))).ok());
  EXPECT_TRUE(StatusOf(d.Ask(p.port(), Blocks({4}))).ok());
  EXPECT_EQ(WatchedOf(rank.Ask(p.port(), p.Ask(0))).number, 1U);
  EXPECT_EQ(WatchedOf(rank.Ask(p.port(), p.Ask(1, 1))).number, 0U);
}

TEST(ChannelOffers, OfNoSuchRankOrHandoffAreRefused) {
  const Instance p;
  ClientEnd d;
  const Status no_rank = StatusOf(d.Ask(p.port(), Blocks({}, kOfferId, {0, 2})));
  EXPECT_NE(no_rank.text().find("(0, 2)"), std::string::npos) << no_rank.text();
  Offer unknown = Blocks({});
  unknown.token = {9};
  EXPECT_EQ(StatusOf(d.Ask(p.port(), unknown)).code(), llm_datadist::LLM_PARAM_INVALID);
}

// A rank that never asks, in an instance that writes to nobody, keeps no more than that.
TEST(ChannelOffers, ThatNobodyTakesAreBounded) {
  const Instance p;
  ClientEnd d;
  const std::vector<uint8_t> large(kMaxOffer);
  uint64_t offer_id = 1;
  const auto state = [&](uint64_t of) { return p.handoffs->Look(kToken, kRank, 0, of).delivery.state; };
  for (; offer_id <= RankOrders::kMostBytes / kMaxOffer; ++offer_id) {
    ASSERT_TRUE(StatusOf(d.Ask(p.port(), Blocks(large, offer_id))).ok());
    ASSERT_LE(state(offer_id), DeliveryState::kFailed);
  }
  ASSERT_TRUE(StatusOf(d.Ask(p.port(), Blocks(large, offer_id))).ok());
  EXPECT_EQ(state(offer_id), DeliveryState::kFailed);
  EXPECT_EQ(state(1), DeliveryState::kOffered);
  ClientEnd rank;
  EXPECT_EQ(WatchedOf(rank.Ask(p.port(), p.Ask(0))).offer_id, 1U);
  EXPECT_EQ(WatchedOf(rank.Ask(p.port(), p.Ask(2))).offer_id, 3U) << "what was seen makes room";
  ASSERT_TRUE(StatusOf(d.Ask(p.port(), Blocks(large, offer_id + 1))).ok());
  EXPECT_EQ(state(offer_id + 1), DeliveryState::kOffered);
}

TEST(ChannelOffers, ARankAsksOnceAtATime) {
  const Instance p;
  ClientEnd rank;
  BareClient gone(p.port());
  ASSERT_TRUE(gone.Greet());
  ASSERT_TRUE(gone.Send(MessageType::kWatch, Encode(p.Ask()), 5).ok());
  ASSERT_TRUE(gone.Send(MessageType::kWatch, Encode(p.Ask()), 6).ok());
  const Result<Frame> older = gone.Receive();
  ASSERT_TRUE(older.ok());
  EXPECT_EQ(older.value().seq, 5U);
  EXPECT_EQ(Decode<Watched>(older.value().body).value().number, 0U);
  // One that has left is not answered, and takes nothing from who asks next.
  ::shutdown(gone.fd.get(), SHUT_WR);
  EXPECT_TRUE(gone.IsCutOff());
  BareClient asker(p.port());
  ASSERT_TRUE(asker.Greet());
  ASSERT_TRUE(asker.Send(MessageType::kOffer, Encode(Blocks({4})), 7).ok());
  EXPECT_TRUE(asker.Receive().ok()) << "whose offer it was left for it";
  EXPECT_EQ(WatchedOf(rank.Ask(p.port(), p.Ask())).number, 1U);
}

TEST(ChannelOffers, DWaitsForTheirDelivery) {
  const Instance p;
  ClientEnd d;
  ClientEnd rank;
  EXPECT_TRUE(StatusOf(d.Ask(p.port(), Blocks({4}))).ok());
  Await await{kToken, kRank, 0, 0, kMaxPatienceMs, kOfferId};
  const auto answer = [&](const ChannelAnswer &of) { return std::get<HandoffNews>(of.answer); };
  const HandoffNews offered = answer(d.Ask(p.port(), await));
  EXPECT_EQ(offered.delivery.state, DeliveryState::kOffered);
  await.seen_version = offered.version;
  await.seen_stamp = offered.stamp;
  const uint64_t waiting = d.Send(p.port(), await);
  EXPECT_TRUE(std::holds_alternative<Reported>(
      rank.Ask(p.port(), p.Say({DeliveryState::kDone, 1, 100, 60, 9, ""})).answer));
  const HandoffNews done = answer(d.Wait(waiting));
  EXPECT_EQ(done.delivery.state, DeliveryState::kDone);
  EXPECT_EQ(done.delivery.bytes, 100U);
  EXPECT_EQ(done.delivery.early_bytes, 60U);
  EXPECT_EQ(done.delivery.run_us, 9U);
}

}  // namespace
}  // namespace datadist::testing
