// Messages of the channel: what was written is read back, and whatever else arrives is refused.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "channel/messages.h"

namespace datadist {
namespace {

using Body = std::vector<uint8_t>;

template <typename Message>
bool Decodes(const Body &body) {
  return Decode<Message>(body).ok();
}

HandoffNews SomeNews() {
  return {HandoffState::kBegun, 2, 3, 4, Body{5, 6}, {7, 8, 9, {10, 11}}, "why",
          {DeliveryState::kFailed, 12, 13, 14, 15, "lost"}};
}

Deliver SomeDelivery() {
  return {{1}, {2, 3}, {4}, 5, {DeliveryState::kRunning, 6, 1ULL << 63U, 8, 9, "late"}};
}

ReportProgress SomeReport() {
  return {{1}, {2, 3}, {{LeaseToken{4}, {5, 6, 7, {8}}}, {LeaseToken{9}, {10, 11, 11, {}}}}};
}

// Each message, and its decoder.
struct Sample {
  const char *name;
  Body body;
  std::function<bool(const Body &)> decodes;
};

std::vector<Sample> Samples() {
  return {
      {"CHANNEL", Encode(ChannelGreeting{{3, 5}, 2}), &Decodes<ChannelGreeting>},
      {"DESCRIBE_RANK", Encode(DescribeRank{"engine", {1}, {2, kMaxRank}, 3}), &Decodes<DescribeRank>},
      {"RANK", Encode(RankAnswer{Status::Ok(), {1, 2, 3}}), &Decodes<RankAnswer>},
      {"RENEW", Encode(Renew{{LeaseToken{1}, LeaseToken{2}}, true}), &Decodes<Renew>},
      {"RENEWED", Encode(Renewed{{LeaseToken{1}}}), &Decodes<Renewed>},
      {"CONFIRM", Encode(Confirm{{1}, 2, {{3}, {4}}}), &Decodes<Confirm>},
      {"CONFIRMED", Encode(Confirmed{LeaseVerdict::kOtherBlocks}), &Decodes<Confirmed>},
      {"RELEASE", Encode(Release{{LeaseToken{1}}}), &Decodes<Release>},
      {"AWAIT", Encode(Await{{1}, {}, 2, 3, 4}), &Decodes<Await>},
      {"AWAIT of a rank", Encode(Await{{1}, RankId{2, kMaxRank}, 3, 4, kMaxPatienceMs}), &Decodes<Await>},
      {"HANDOFF", Encode(SomeNews()), &Decodes<HandoffNews>},
      {"HANDOFF of nothing", Encode(HandoffNews{}), &Decodes<HandoffNews>},
      {"REPORT", Encode(SomeReport()), &Decodes<ReportProgress>},
      {"OFFER", Encode(Offer{{1}, {2, kMaxRank}, 3, {4, 5}}), &Decodes<Offer>},
      {"OFFERED", Encode(Offered{}), &Decodes<Offered>},
      {"OFFERED not taken", Encode(Offered{Invalid("no")}), &Decodes<Offered>},
      {"WATCH", Encode(Watch{{1}, {2, 3}, 4, kMaxPatienceMs}), &Decodes<Watch>},
      {"WATCHED", Encode(Watched{1, {2}, 3, {4, 5}}), &Decodes<Watched>},
      {"WATCHED of nothing", Encode(Watched{}), &Decodes<Watched>},
      {"WATCHED of a role", Encode(Watched{1, {}, 0, {}, RoleOrder{2, InstanceRole::kBoth, 3}}), &Decodes<Watched>},
      {"DECLARE", Encode(Declare{{1}, {2, kMaxRank}, 3, "why"}), &Decodes<Declare>},
      {"SWITCH", Encode(Switch{{1}, InstanceRole::kPrefill, kMaxDrainMs, kMaxPatienceMs}), &Decodes<Switch>},
      {"SWITCHED", Encode(SwitchStatus{SwitchState::kDone, InstanceRole::kBoth, 1, 2, 3, 4, "why"}),
       &Decodes<SwitchStatus>},
      {"DELIVER", Encode(SomeDelivery()), &Decodes<Deliver>},
  };
}

TEST(ChannelMessages, AreReadBack) {
  const auto greeting = Decode<ChannelGreeting>(Encode(ChannelGreeting{{3, 5}, 2}));
  ASSERT_TRUE(greeting.ok());
  EXPECT_EQ(greeting.value().versions.lowest, 3);
  EXPECT_EQ(greeting.value().versions.highest, 5);
  EXPECT_EQ(greeting.value().content_version, 2);
  const auto asked = Decode<DescribeRank>(Encode(DescribeRank{"engine", {1}, {2, 4095}, 1ULL << 63U}));
  ASSERT_TRUE(asked.ok());
  EXPECT_EQ(asked.value().engine_id, "engine");
  EXPECT_EQ(asked.value().incarnation, GrantorIncarnation{1});
  EXPECT_EQ(asked.value().rank.pp_rank, 2);
  EXPECT_EQ(asked.value().rank.tp_rank, 4095);
  EXPECT_EQ(asked.value().asker, 1ULL << 63U);
  const auto confirm = Decode<Confirm>(Encode(Confirm{{1}, 2, {{3}, {4}}}));
  ASSERT_TRUE(confirm.ok());
  EXPECT_EQ(confirm.value().token, LeaseToken{1});
  EXPECT_EQ(confirm.value().generation, 2U);
  EXPECT_EQ(confirm.value().content.prompt, ContentDigest{3});
  EXPECT_EQ(confirm.value().content.blocks, ContentDigest{4});
  const auto rank = Decode<RankAnswer>(Encode(RankAnswer{Status::Ok(), Body(kMaxGeometry, 9)}));
  ASSERT_TRUE(rank.ok());
  EXPECT_EQ(rank.value().geometry, Body(kMaxGeometry, 9));
  const auto refusal = Decode<RankAnswer>(Encode(RankAnswer{Invalid("no"), {}}));
  ASSERT_TRUE(refusal.ok());
  EXPECT_EQ(refusal.value().status.text(), "no");
}

TEST(ChannelMessages, OfHandoffsAreReadBack) {
  const auto await = Decode<Await>(Encode(Await{{1}, RankId{2, 3}, 4, 1ULL << 63U, 5, 6}));
  ASSERT_TRUE(await.ok());
  EXPECT_EQ(await.value().token, LeaseToken{1});
  EXPECT_EQ(await.value().rank->pp_rank, 2);
  EXPECT_EQ(await.value().rank->tp_rank, 3);
  EXPECT_EQ(await.value().seen_version, 4U);
  EXPECT_EQ(await.value().seen_stamp, 1ULL << 63U);
  EXPECT_EQ(await.value().patience_ms, 5U);
  EXPECT_EQ(await.value().offer_id, 6U);
  EXPECT_FALSE(Decode<Await>(Encode(Await{})).value().rank.has_value());
  const auto news = Decode<HandoffNews>(Encode(SomeNews()));
  ASSERT_TRUE(news.ok());
  EXPECT_EQ(news.value().state, HandoffState::kBegun);
  EXPECT_EQ(news.value().epoch, 2U);
  EXPECT_EQ(news.value().version, 3U);
  EXPECT_EQ(news.value().stamp, 4U);
  EXPECT_EQ(news.value().blob, (Body{5, 6}));
  EXPECT_EQ(news.value().mark.epoch, 7U);
  EXPECT_EQ(news.value().mark.base, 8U);
  EXPECT_EQ(news.value().mark.next, 9U);
  EXPECT_EQ(news.value().mark.layers, (Body{10, 11}));
  EXPECT_EQ(news.value().reason, "why");
  EXPECT_EQ(news.value().delivery.state, DeliveryState::kFailed);
  EXPECT_EQ(news.value().delivery.early_bytes, 14U);
  EXPECT_EQ(news.value().delivery.reason, "lost");
  EXPECT_FALSE(Decode<HandoffNews>(Encode(HandoffNews{})).value().blob.has_value());
  const auto report = Decode<ReportProgress>(Encode(SomeReport()));
  ASSERT_TRUE(report.ok());
  EXPECT_EQ(report.value().key, HandoffKey{1});
  EXPECT_EQ(report.value().rank.pp_rank, 2);
  ASSERT_EQ(report.value().marks.size(), 2U);
  EXPECT_EQ(report.value().marks[1].first, LeaseToken{9});
  EXPECT_EQ(report.value().marks[0].second.layers, Body{8});
  EXPECT_EQ(report.value().marks[1].second.next, 11U);
}

TEST(ChannelMessages, OfOffersAreReadBack) {
  const auto offer = Decode<Offer>(Encode(Offer{{1}, {2, 3}, 1ULL << 63U, {4, 5}}));
  ASSERT_TRUE(offer.ok());
  EXPECT_EQ(offer.value().token, LeaseToken{1});
  EXPECT_EQ(offer.value().rank.tp_rank, 3);
  EXPECT_EQ(offer.value().offer_id, 1ULL << 63U);
  EXPECT_EQ(offer.value().blob, (Body{4, 5}));
  EXPECT_EQ(Decode<Offered>(Encode(Offered{Invalid("no")})).value().status.text(), "no");
  const auto watch = Decode<Watch>(Encode(Watch{{1}, {2, 3}, 4, 5}));
  ASSERT_TRUE(watch.ok());
  EXPECT_EQ(watch.value().key, HandoffKey{1});
  EXPECT_EQ(watch.value().rank.pp_rank, 2);
  EXPECT_EQ(watch.value().seen, 4U);
  EXPECT_EQ(watch.value().patience_ms, 5U);
  const auto watched = Decode<Watched>(Encode(Watched{1, {2}, 3, {4}}));
  ASSERT_TRUE(watched.ok());
  EXPECT_EQ(watched.value().number, 1U);
  EXPECT_EQ(watched.value().token, LeaseToken{2});
  EXPECT_EQ(watched.value().offer_id, 3U);
  EXPECT_EQ(watched.value().blob, Body{4});
  const auto order = Decode<Watched>(Encode(Watched{1, {}, 0, {}, RoleOrder{2, InstanceRole::kDecode, 3}}));
  ASSERT_TRUE(order.ok() && order.value().role.has_value());
  EXPECT_EQ(order.value().number, 1U);
  EXPECT_EQ(order.value().role->attempt, 2U);
  EXPECT_EQ(order.value().role->role, InstanceRole::kDecode);
  EXPECT_EQ(order.value().role->limit_ms, 3U);
  const auto declare = Decode<Declare>(Encode(Declare{{1}, {2, 3}, 4, "why"}));
  ASSERT_TRUE(declare.ok());
  EXPECT_EQ(declare.value().key, HandoffKey{1});
  EXPECT_EQ(declare.value().rank.tp_rank, 3);
  EXPECT_EQ(declare.value().attempt, 4U);
  EXPECT_EQ(declare.value().reason, "why");
  const auto wish = Decode<Switch>(Encode(Switch{{1}, InstanceRole::kPrefill, 2, 3}));
  ASSERT_TRUE(wish.ok());
  EXPECT_EQ(wish.value().id, SwitchId{1});
  EXPECT_EQ(wish.value().role, InstanceRole::kPrefill);
  EXPECT_EQ(wish.value().drain_ms, 2U);
  EXPECT_EQ(wish.value().patience_ms, 3U);
  const auto switched =
      Decode<SwitchStatus>(Encode(SwitchStatus{SwitchState::kApplying, InstanceRole::kBoth, 1, 2, 3, 4, "why"}));
  ASSERT_TRUE(switched.ok());
  EXPECT_EQ(switched.value().state, SwitchState::kApplying);
  EXPECT_EQ(switched.value().role, InstanceRole::kBoth);
  EXPECT_EQ(switched.value().leases, 1U);
  EXPECT_EQ(switched.value().handoffs, 2U);
  EXPECT_EQ(switched.value().taken, 3U);
  EXPECT_EQ(switched.value().ranks, 4U);
  EXPECT_EQ(switched.value().reason, "why");
  const auto deliver = Decode<Deliver>(Encode(SomeDelivery()));
  ASSERT_TRUE(deliver.ok());
  EXPECT_EQ(deliver.value().key, HandoffKey{1});
  EXPECT_EQ(deliver.value().rank.pp_rank, 2);
  EXPECT_EQ(deliver.value().token, LeaseToken{4});
  EXPECT_EQ(deliver.value().offer_id, 5U);
  const Delivery &delivery = deliver.value().delivery;
  EXPECT_EQ(delivery.state, DeliveryState::kRunning);
  EXPECT_EQ(delivery.epoch, 6U);
  EXPECT_EQ(delivery.bytes, 1ULL << 63U);
  EXPECT_EQ(delivery.early_bytes, 8U);
  EXPECT_EQ(delivery.run_us, 9U);
  EXPECT_EQ(delivery.reason, "late");
}

// The largest of each that may be sent fits its frame.
TEST(ChannelMessages, FitTheirFrames) {
  const std::vector<LeaseToken> most(kMaxLeasesPerMessage);
  EXPECT_EQ(Encode(Renew{most}).size(), BodyCap(MessageType::kRenew));
  EXPECT_EQ(Encode(Renewed{most}).size(), BodyCap(MessageType::kRenewed));
  EXPECT_EQ(Encode(Release{most}).size(), BodyCap(MessageType::kRelease));
  EXPECT_TRUE(Decodes<Renew>(Encode(Renew{most})));
  EXPECT_LE(Encode(RankAnswer{Status::Ok(), Body(kMaxGeometry)}).size(), BodyCap(MessageType::kRank));
  const Body layers(kMaxLayerBytes);
  const HandoffNews news{HandoffState::kEnded, 1, 1, 1, Body(kMaxHandoffBlob), {1, 1, 1, layers}, std::string(5000, 'x'),
                         {DeliveryState::kFailed, 1, 1, 1, 1, std::string(5000, 'x')}};
  EXPECT_LE(Encode(news).size(), BodyCap(MessageType::kHandoff));
  EXPECT_LE(Encode(Offer{{}, {}, 1, Body(kMaxOffer)}).size(), BodyCap(MessageType::kOffer));
  EXPECT_TRUE(Decodes<Offer>(Encode(Offer{{}, {}, 1, Body(kMaxOffer)})));
  EXPECT_LE(Encode(Watched{1, {}, 1, Body(kMaxOffer)}).size(), BodyCap(MessageType::kWatched));
  EXPECT_LE(Encode(Offered{Invalid(std::string(5000, 'x'))}).size(), BodyCap(MessageType::kOffered));
  EXPECT_LE(Encode(Deliver{{}, {}, {}, 1, {{}, 1, 1, 1, 1, std::string(5000, 'x')}}).size(),
            BodyCap(MessageType::kDeliver));
  ReportProgress report;
  report.marks.assign(kMaxMarksPerReport, {LeaseToken{}, {1, 1, 1, layers}});
  EXPECT_EQ(Encode(report).size(), BodyCap(MessageType::kReport));
  EXPECT_TRUE(Decodes<ReportProgress>(Encode(report)));
  EXPECT_LE(Encode(DescribeRank{std::string(2 * kMaxEngineId, 'x'), {}, {}, 1}).size(),
            BodyCap(MessageType::kDescribeRank));
}

TEST(ChannelMessages, CutAndLongerOnesAreRefused) {
  for (const Sample &sample : Samples()) {
    EXPECT_TRUE(sample.decodes(sample.body)) << sample.name;
    for (size_t size = 0; size < sample.body.size(); ++size) {
      EXPECT_FALSE(sample.decodes(Body(sample.body.begin(), sample.body.begin() + static_cast<std::ptrdiff_t>(size))))
          << sample.name << " of " << size << " bytes";
    }
    Body longer = sample.body;
    longer.push_back(0);
    EXPECT_FALSE(sample.decodes(longer)) << sample.name;
  }
}

TEST(ChannelMessages, ValuesOutOfTheirRangeAreRefused) {
  EXPECT_FALSE(Decodes<DescribeRank>(Encode(DescribeRank{"e", {}, {0, kMaxRank + 1}, 1})));
  EXPECT_FALSE(Decodes<DescribeRank>(Encode(DescribeRank{"e", {}, {kMaxRank + 1, 0}, 1})));
  EXPECT_FALSE(Decodes<Confirmed>(Body{kLeaseVerdicts}));
  EXPECT_FALSE(Decodes<RankAnswer>(Encode(RankAnswer{Invalid("no"), {1}}))) << "refused, and told all the same";
  EXPECT_FALSE(Decodes<RankAnswer>(Encode(RankAnswer{Status(llm_datadist::LLM_TIMEOUT, "no"), {}})))
      << "the peer does not choose what our caller is told";
  Body renew = Encode(Renew{{LeaseToken{1}}, true});
  renew.back() = 2;
  EXPECT_FALSE(Decodes<Renew>(renew));
  EXPECT_FALSE(Decodes<Await>(Encode(Await{{1}, {}, 0, 0, kMaxPatienceMs + 1})));
  EXPECT_FALSE(Decodes<Await>(Encode(Await{{1}, RankId{kMaxRank + 1, 0}, 0, 0, 0})));
  EXPECT_FALSE(Decodes<HandoffNews>(Encode(HandoffNews{static_cast<HandoffState>(kHandoffStates), 0, 0, 0, {}, {}, ""})));
  EXPECT_FALSE(Decodes<HandoffNews>(Encode(HandoffNews{{}, 0, 0, 0, {}, {0, 2, 1, {}}, ""}))) << "backwards";
  EXPECT_FALSE(Decodes<ReportProgress>(Encode(ReportProgress{{}, {}, {{LeaseToken{}, {0, 2, 1, {}}}}})));
  EXPECT_FALSE(Decodes<ReportProgress>(Encode(ReportProgress{{}, {0, kMaxRank + 1}, {}})));
  EXPECT_FALSE(Decodes<Offer>(Encode(Offer{{}, {0, kMaxRank + 1}, 1, {}})));
  EXPECT_FALSE(Decodes<Offer>(Encode(Offer{{}, {}, 0, {}}))) << "of nobody";
  EXPECT_FALSE(Decodes<Offer>(Encode(Offer{{}, {}, 1, Body(kMaxOffer + 1)})));
  EXPECT_FALSE(Decodes<Offered>(Encode(Offered{Status(llm_datadist::LLM_TIMEOUT, "no")})));
  EXPECT_FALSE(Decodes<Watch>(Encode(Watch{{}, {kMaxRank + 1, 0}, 0, 0})));
  EXPECT_FALSE(Decodes<Watch>(Encode(Watch{{}, {}, 0, kMaxPatienceMs + 1})));
  EXPECT_FALSE(Decodes<Watched>(Encode(Watched{1, {}, 1, Body(kMaxOffer + 1)})));
  const auto no_role = static_cast<InstanceRole>(kInstanceRoles);
  for (const InstanceRole role : {InstanceRole::kNone, no_role}) {
    EXPECT_FALSE(Decodes<Watched>(Encode(Watched{1, {}, 0, {}, RoleOrder{1, role, 1}})));
    EXPECT_FALSE(Decodes<Switch>(Encode(Switch{{}, role, 1, 1})));
  }
  EXPECT_FALSE(Decodes<Switch>(Encode(Switch{{}, InstanceRole::kBoth, kMaxDrainMs + 1, 1})));
  EXPECT_FALSE(Decodes<Switch>(Encode(Switch{{}, InstanceRole::kBoth, 1, kMaxPatienceMs + 1})));
  EXPECT_FALSE(Decodes<Declare>(Encode(Declare{{}, {0, kMaxRank + 1}, 1, ""})));
  EXPECT_FALSE(Decodes<SwitchStatus>(Encode(SwitchStatus{SwitchState::kDone, no_role})));
  EXPECT_FALSE(Decodes<SwitchStatus>(Encode(SwitchStatus{static_cast<SwitchState>(kSwitchStates)})));
  Body neither = Encode(Watched{});
  neither[sizeof(uint64_t)] = 2;
  EXPECT_FALSE(Decodes<Watched>(neither)) << "neither an offer nor a role";
  EXPECT_FALSE(Decodes<Deliver>(Encode(Deliver{{}, {0, kMaxRank + 1}, {}, 1, {}})));
  EXPECT_FALSE(Decodes<Deliver>(Encode(Deliver{{}, {}, {}, 1, {static_cast<DeliveryState>(kDeliveryStates)}})));
  // A mark of more layers than one has room for, and one mark more than a message has.
  Body report = Encode(ReportProgress{{}, {}, {{LeaseToken{}, {0, 0, 0, Body(kMaxLayerBytes)}}}});
  report[sizeof(HandoffKey) + 8 + sizeof(LeaseToken) + 12] = 1;
  report.push_back(0);
  EXPECT_FALSE(Decodes<ReportProgress>(report));
  Body many = Encode(ReportProgress{});
  many[sizeof(HandoffKey) + 4] = kMaxMarksPerReport + 1;
  many.resize(many.size() + (kMaxMarksPerReport + 1) * (sizeof(LeaseToken) + 14));
  EXPECT_FALSE(Decodes<ReportProgress>(many));
  // As many tokens as were announced, and more than a message may have.
  const uint32_t count = kMaxLeasesPerMessage + 1;
  Body tokens = {static_cast<uint8_t>(count), static_cast<uint8_t>(count >> 8), 0, 0};
  tokens.resize(tokens.size() + count * sizeof(LeaseToken));
  EXPECT_FALSE(Decodes<Release>(tokens));
  tokens.push_back(0);
  EXPECT_FALSE(Decodes<Renew>(tokens));
}

TEST(ChannelMessages, RandomBytesCostNothingButARefusal) {
  std::mt19937 random(1);  // NOLINT: the same bytes each time
  for (const Sample &sample : Samples()) {
    for (int i = 0; i < 20000; ++i) {
      Body body = sample.body;
      for (uint32_t changes = 1 + random() % 4; changes > 0; --changes) {
        body[random() % body.size()] = static_cast<uint8_t>(random());
      }
      body.resize(body.size() - random() % 2 * (random() % body.size()));
      (void)sample.decodes(body);
    }
  }
}

}  // namespace
}  // namespace datadist
