// The grants of one endpoint, and the uses that keep them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "memory/write_grants.h"

namespace datadist {
namespace {

using llm_datadist::LLM_LINK_BUSY;
using llm_datadist::LLM_PARAM_INVALID;
using llm_datadist::LLM_SUCCESS;
using ::testing::HasSubstr;

constexpr uint64_t kCluster = 7;

class WriteGrantsTest : public ::testing::Test {
 protected:
  uint64_t Add(std::vector<WriteGrants::Area> areas) {
    const auto id = grants_.Add(kCluster, std::move(areas));
    EXPECT_TRUE(id.ok()) << id.status().text();
    return id.ok() ? id.value() : 0;
  }
  bool Has(const std::vector<uint64_t> &tensors, const std::vector<Span> &spans, uint64_t cluster = kCluster) {
    return grants_.Take(cluster, tensors, spans).ok();
  }
  WriteGrants grants_;
};

TEST_F(WriteGrantsTest, HaveWhatIsWithinAPieceOfThem) {
  Add({{{1000, 2000}, {{10, 20}, {20, 30}, {50, 60}}}});
  for (const Span &span : {Span{10, 20}, {10, 1}, {29, 1}, {15, 10}, {50, 10}}) {
    EXPECT_TRUE(Has({1000, 2000}, {span})) << span.offset;
  }
  for (const Span &span : {Span{9, 1}, {9, 2}, {29, 2}, {30, 1}, {10, 50}, {49, 5}, {60, 1}, {0, 100},
                           {10, UINT64_MAX}, {UINT64_MAX, 2}, {UINT64_MAX - 4, 20}, {20, UINT64_MAX - 10}}) {
    EXPECT_FALSE(Has({1000}, {span})) << span.offset;
    EXPECT_FALSE(Has({1000}, {{10, 1}, span})) << span.offset;
    EXPECT_FALSE(Has({1000}, {span, {10, 1}})) << span.offset;
  }
  EXPECT_FALSE(Has({1000, 2000, 3000}, {{10, 1}}));
  EXPECT_FALSE(Has({999}, {{10, 1}}));
  EXPECT_FALSE(Has({1000}, {{10, 1}}, kCluster + 1));
  EXPECT_FALSE(Has({}, {{10, 1}})) << "nothing is in no grant";
  EXPECT_FALSE(Has({1000}, {}));
}

// Tensors of which several areas speak have them all; the others only theirs.
TEST_F(WriteGrantsTest, JoinWhatIsSaidOfATensor) {
  Add({{{1000, 2000}, {{0, 10}}}, {{2000, 3000}, {{10, 20}}}});
  EXPECT_TRUE(Has({2000}, {{0, 20}}));
  EXPECT_FALSE(Has({1000, 2000}, {{0, 20}}));
  EXPECT_FALSE(Has({2000, 3000}, {{0, 20}}));
  EXPECT_TRUE(Has({1000, 2000}, {{0, 10}}));
  EXPECT_TRUE(Has({2000, 3000}, {{10, 10}}));
  EXPECT_FALSE(Has({2000, 1000}, {{0, 20}})) << "in whatever order they are asked for";
}

TEST_F(WriteGrantsTest, AreLookedAtUntilOneHasItAll) {
  Add({{{1000}, {{0, 10}}}});
  EXPECT_FALSE(Has({1000}, {{0, 10}, {50, 10}}));
  Add({{{1000}, {{0, 10}, {50, 60}}}});
  EXPECT_TRUE(Has({1000}, {{0, 10}, {50, 10}})) << "though an older one has its beginning";
}

TEST_F(WriteGrantsTest, LiveUntilTheirLastUse) {
  const uint64_t id = Add({{{1000}, {{0, 10}}}});
  Result<WriteGrants::Use> first = grants_.Take(kCluster, {1000}, std::vector<Span>{{0, 10}});
  Result<WriteGrants::Use> second = grants_.Take(kCluster, {1000}, std::vector<Span>{{5, 5}});
  ASSERT_TRUE(first.ok() && second.ok());
  EXPECT_EQ(grants_.Revoke(id).code(), LLM_LINK_BUSY);
  EXPECT_FALSE(Has({1000}, {{0, 10}})) << "no use begins after Revoke was called";
  WriteGrants::Use moved = std::move(first).value();
  EXPECT_EQ(grants_.Revoke(id).code(), LLM_LINK_BUSY);
  moved.reset();
  EXPECT_EQ(grants_.Revoke(id).code(), LLM_LINK_BUSY);
  second.value().reset();
  EXPECT_EQ(grants_.Revoke(id).code(), LLM_SUCCESS);
  EXPECT_EQ(grants_.Revoke(id).code(), LLM_SUCCESS);
  EXPECT_EQ(grants_.Revoke(id + 1).code(), LLM_SUCCESS);
  EXPECT_EQ(grants_.Revoke(0).code(), LLM_SUCCESS);
}

// A refusal keeps nothing: what was looked at in vain may be revoked at once.
TEST_F(WriteGrantsTest, AreNotHeldByARefusal) {
  const uint64_t id = Add({{{1000}, {{0, 10}}}});
  const auto refused = grants_.Take(kCluster, {1000}, std::vector<Span>{{0, 10}, {20, 1}});
  EXPECT_EQ(refused.status().code(), LLM_PARAM_INVALID);
  EXPECT_EQ(grants_.Revoke(id).code(), LLM_SUCCESS);
}

TEST_F(WriteGrantsTest, AreBoundedInNumber) {
  for (size_t i = 0; i < WriteGrants::kMaxGrants; ++i) {
    Add({{{1000}, {{10 * i, 10 * i + 5}}}});
  }
  const auto one_more = grants_.Add(kCluster + 1, {{{1000}, {{0, 1}}}});
  EXPECT_EQ(one_more.status().code(), LLM_PARAM_INVALID);
  EXPECT_THAT(one_more.status().text(), HasSubstr("65536"));
  EXPECT_EQ(grants_.Revoke(1).code(), LLM_SUCCESS);
  EXPECT_TRUE(grants_.Add(kCluster + 1, {{{1000}, {{0, 1}}}}).ok());
}

TEST_F(WriteGrantsTest, AreBoundedInSize) {
  std::vector<Range> many;
  for (size_t i = 0; i + 1 < WriteGrants::kMaxParts; ++i) {
    many.push_back({2 * i, 2 * i + 1});
  }
  const uint64_t all = Add({{{1000}, many}});
  EXPECT_THAT(grants_.Add(kCluster, {{{1000}, {{0, 1}}}}).status().text(), HasSubstr("4194304"));
  EXPECT_EQ(grants_.Revoke(all).code(), LLM_SUCCESS);
  Add({{{1000}, {{0, 1}}}});
}

}  // namespace
}  // namespace datadist
