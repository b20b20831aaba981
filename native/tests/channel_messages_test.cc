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

// The largest of each that may be sent fits its frame.
TEST(ChannelMessages, FitTheirFrames) {
  const std::vector<LeaseToken> most(kMaxLeasesPerMessage);
  EXPECT_EQ(Encode(Renew{most}).size(), BodyCap(MessageType::kRenew));
  EXPECT_EQ(Encode(Renewed{most}).size(), BodyCap(MessageType::kRenewed));
  EXPECT_EQ(Encode(Release{most}).size(), BodyCap(MessageType::kRelease));
  EXPECT_TRUE(Decodes<Renew>(Encode(Renew{most})));
  EXPECT_LE(Encode(RankAnswer{Status::Ok(), Body(kMaxGeometry)}).size(), BodyCap(MessageType::kRank));
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
