// RoleSwitch alone, with a clock that the test moves.
#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "channel/role_switch.h"

namespace datadist::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr RankId kRank{0, 0};
constexpr RankId kOther{0, 1};
constexpr seconds kDrain{30};
constexpr seconds kApply{10};
const auto kHour = std::chrono::hours(1);

SwitchId Id(uint8_t number) { return {number}; }

class RoleSwitchTest : public ::testing::Test {
 protected:
  LeaseToken Grant(LeaseTable::Clock::duration lasts = kHour) {
    return leases->Grant("r", {{1}, {2}}, 3, {lasts, lasts}).value().token;
  }
  SwitchStatus Ask(InstanceRole wanted, uint8_t id = 1, milliseconds drain = kDrain) {
    return roles.Ask(Id(id), wanted, drain);
  }
  // Drains, which must need nothing, and gives the order to these.
  RoleOrder Order(InstanceRole wanted, std::set<RankId> ranks, uint8_t id = 1) {
    EXPECT_EQ(Ask(wanted, id).state, SwitchState::kDraining);
    const std::optional<RoleOrder> order = roles.Advance();
    EXPECT_TRUE(order.has_value());
    roles.Ordered(*order, std::move(ranks));
    return *order;
  }

  LeaseTable::Clock::time_point now{seconds(1000)};
  const LeaseTable::Now clock = [this] { return now; };
  const std::shared_ptr<LeaseTable> leases = std::make_shared<LeaseTable>(kHour, clock);
  const std::shared_ptr<HandoffTable> handoffs = std::move(HandoffTable::Create()).value();
  RoleSwitch roles{leases, handoffs, kApply, clock};
};

TEST_F(RoleSwitchTest, ChangesDutiesWhenAllRanksHaveDoneIt) {
  EXPECT_EQ(roles.duties(), InstanceRole::kBoth);
  EXPECT_TRUE(roles.may_pull());
  const RoleOrder order = Order(InstanceRole::kPrefill, {kRank, kOther});
  EXPECT_EQ(order.role, InstanceRole::kPrefill);
  EXPECT_EQ(order.limit_ms, 10'000U);
  roles.Declare(kRank, order.attempt, "");
  EXPECT_FALSE(roles.Advance().has_value()) << "an order is given once";
  EXPECT_EQ(roles.duties(), InstanceRole::kNone);
  EXPECT_EQ(Ask(InstanceRole::kPrefill).ranks, 1U);
  roles.Declare(kOther, order.attempt, "");
  roles.Advance();
  const SwitchStatus done = Ask(InstanceRole::kPrefill);
  EXPECT_EQ(done.state, SwitchState::kDone);
  EXPECT_EQ(done.role, InstanceRole::kPrefill);
  EXPECT_EQ(roles.duties(), InstanceRole::kPrefill);
  EXPECT_FALSE(roles.may_pull());
  EXPECT_FALSE(roles.IsUnderWay());
}

TEST_F(RoleSwitchTest, WaitsForLeasesHandoffsAndWhatIsTaken) {
  const LeaseToken lease = Grant();
  ASSERT_TRUE(handoffs->Promise({5}, "h"));
  roles.SetTaken(1);
  const SwitchStatus status = Ask(InstanceRole::kDecode);
  EXPECT_EQ(status.state, SwitchState::kDraining);
  EXPECT_EQ(status.leases, 1U);
  EXPECT_EQ(status.handoffs, 1U);
  EXPECT_EQ(status.taken, 1U);
  EXPECT_EQ(roles.duties(), InstanceRole::kNone);
  EXPECT_TRUE(roles.may_pull()) << "what was taken is still pulled";
  // Each alone.
  roles.SetTaken(0);
  handoffs->End({5}, "over");
  EXPECT_FALSE(roles.Advance().has_value());
  leases->Release({lease});
  ASSERT_TRUE(handoffs->Promise({6}, "h"));
  EXPECT_FALSE(roles.Advance().has_value());
  handoffs->End({6}, "over");
  roles.SetTaken(1);
  EXPECT_FALSE(roles.Advance().has_value());
  roles.SetTaken(0);
  EXPECT_TRUE(roles.Advance().has_value());
}

TEST_F(RoleSwitchTest, ASealedHandoffIsALease) {
  ASSERT_TRUE(handoffs->Promise({5}, "h"));
  ASSERT_TRUE(handoffs->Seal({5}, 1, {}).value());
  Ask(InstanceRole::kDecode);
  EXPECT_TRUE(roles.Advance().has_value()) << "nobody forgets it while the scheduler takes no steps";
}

TEST_F(RoleSwitchTest, LeasesEndByTimeWhileNobodyLooks) {
  Grant(seconds(5));
  Ask(InstanceRole::kDecode);
  now += seconds(4);
  EXPECT_FALSE(roles.Advance().has_value());
  now += seconds(1);
  EXPECT_TRUE(roles.Advance().has_value());
}

TEST_F(RoleSwitchTest, WhatIsLeftAfterTheDrainIsRevoked) {
  Grant();
  ASSERT_TRUE(handoffs->Promise({5}, "h"));
  roles.SetTaken(1);
  Ask(InstanceRole::kDecode, 1, seconds(3));
  now += seconds(3);
  EXPECT_TRUE(roles.Advance().has_value());
  EXPECT_FALSE(roles.may_pull());
  const auto ended = leases->TakeEnded();
  ASSERT_EQ(ended.size(), 1U);
  EXPECT_EQ(ended[0].why, LeaseTable::End::kRevoked);
  const HandoffNews news = handoffs->Look({5}, {}, 0);
  EXPECT_EQ(news.state, HandoffState::kEnded);
  EXPECT_EQ(news.reason, "P changes its role");
}

TEST_F(RoleSwitchTest, ARankThatCannotLeavesTheRoleAsItWas) {
  const RoleOrder order = Order(InstanceRole::kDecode, {kRank, kOther});
  roles.Declare(kOther, order.attempt, "a link is not gone");
  roles.Advance();
  const SwitchStatus refused = Ask(InstanceRole::kDecode);
  EXPECT_EQ(refused.state, SwitchState::kRefused);
  EXPECT_EQ(refused.reason, "rank (pp 0, tp 1): a link is not gone");
  EXPECT_EQ(refused.role, InstanceRole::kBoth);
  EXPECT_EQ(roles.duties(), InstanceRole::kBoth);
  EXPECT_TRUE(roles.may_pull());
  // Another wish is another try, and what is still said of this one is void.
  const RoleOrder again = Order(InstanceRole::kDecode, {kRank}, 2);
  EXPECT_NE(again.attempt, order.attempt);
  roles.Declare(kRank, order.attempt, "");
  roles.Advance();
  EXPECT_TRUE(roles.IsUnderWay());
  roles.Declare(kRank, again.attempt, "");
  roles.Advance();
  EXPECT_EQ(roles.role(), InstanceRole::kDecode);
}

TEST_F(RoleSwitchTest, ARankThatNeverAnswersIsWaitedForSoLong) {
  Order(InstanceRole::kDecode, {kRank});
  now += kApply + RoleSwitch::kAnswer - milliseconds(1);
  roles.Advance();
  EXPECT_TRUE(roles.IsUnderWay());
  now += milliseconds(1);
  roles.Advance();
  const SwitchStatus refused = Ask(InstanceRole::kDecode);
  EXPECT_EQ(refused.state, SwitchState::kRefused);
  EXPECT_EQ(refused.reason, "rank (pp 0, tp 0) has not answered");
  EXPECT_EQ(roles.duties(), InstanceRole::kBoth);
}

TEST_F(RoleSwitchTest, WithoutRanksThatWatchThereIsNobodyToWaitFor) {
  Order(InstanceRole::kDecode, {});
  roles.Advance();
  EXPECT_EQ(roles.role(), InstanceRole::kDecode);
}

TEST_F(RoleSwitchTest, OneSwitchAtATime) {
  Grant();
  Ask(InstanceRole::kDecode, 1);
  const SwitchStatus refused = Ask(InstanceRole::kPrefill, 2);
  EXPECT_EQ(refused.state, SwitchState::kRefused);
  EXPECT_EQ(refused.reason, "it is switching to decode just now");
  EXPECT_EQ(Ask(InstanceRole::kDecode, 3).state, SwitchState::kDraining) << "who wants the same waits for it";
}

TEST_F(RoleSwitchTest, SaidAgainItBeginsNothing) {
  roles.Declare(kRank, Order(InstanceRole::kDecode, {kRank}, 1).attempt, "no");
  Ask(InstanceRole::kDecode, 2);
  roles.Advance();
  for (const uint8_t id : {uint8_t{1}, uint8_t{2}}) {
    EXPECT_EQ(Ask(InstanceRole::kDecode, id).state, SwitchState::kRefused) << "both were told of one that failed";
  }
  // Late after others: it does not turn the instance back.
  roles.Declare(kRank, Order(InstanceRole::kDecode, {kRank}, 3).attempt, "");
  roles.Advance();
  roles.Declare(kRank, Order(InstanceRole::kPrefill, {kRank}, 4).attempt, "");
  roles.Advance();
  EXPECT_EQ(Ask(InstanceRole::kDecode, 3).state, SwitchState::kDone);
  EXPECT_EQ(roles.role(), InstanceRole::kPrefill);
  EXPECT_EQ(Ask(InstanceRole::kPrefill, 5).state, SwitchState::kDone) << "it is of that role";
  EXPECT_FALSE(roles.IsUnderWay());
}

TEST_F(RoleSwitchTest, WhoAsksForItIsRememberedInLimits) {
  Grant();
  for (uint8_t id = 1; id <= RoleSwitch::kMostRemembered; ++id) {
    EXPECT_EQ(Ask(InstanceRole::kDecode, id).state, SwitchState::kDraining);
  }
  EXPECT_EQ(Ask(InstanceRole::kDecode, 99).state, SwitchState::kRefused) << "it could not be told how it ended";
  EXPECT_EQ(Ask(InstanceRole::kDecode, 2).state, SwitchState::kDraining);
}

}  // namespace
}  // namespace datadist::testing
