// SWITCH, role orders and DECLARE over a channel.
#include <gtest/gtest.h>

#include <string>

#include "support/channel_ends.h"
#include "support/key_file.h"

namespace datadist::testing {
namespace {

using std::chrono::milliseconds;

constexpr RankId kRank{0, 1};

Switch To(InstanceRole role, uint8_t id = 1, uint32_t patience_ms = kMaxPatienceMs, uint32_t drain_ms = kMaxDrainMs) {
  return {{id}, role, drain_ms, patience_ms};
}

SwitchStatus StatusOf(const ChannelAnswer &answer) {
  const auto *const status = std::get_if<SwitchStatus>(&answer.answer);
  EXPECT_NE(status, nullptr);
  return status != nullptr ? *status : SwitchStatus{};
}

Watched WatchedOf(const ChannelAnswer &answer) {
  const auto *const watched = std::get_if<Watched>(&answer.answer);
  EXPECT_NE(watched, nullptr);
  return watched != nullptr ? *watched : Watched{};
}

// A worker of the instance.
struct Rank {
  explicit Rank(const ServerEnd &instance) : end(instance) {}
  uint64_t Watch(uint64_t seen, uint32_t patience_ms = kMaxPatienceMs) {
    return client.Send(end.port(), datadist::Watch{end.handoffs->key(), kRank, seen, patience_ms});
  }
  // One that finds nothing.
  void Begin() { EXPECT_EQ(WatchedOf(client.Wait(Watch(0, 1))).number, 0U); }
  void Declare(uint64_t attempt, const std::string &reason = "") {
    const auto answer = client.Ask(end.port(), datadist::Declare{end.handoffs->key(), kRank, attempt, reason});
    EXPECT_TRUE(std::holds_alternative<Reported>(answer.answer));
  }
  const ServerEnd &end;
  ClientEnd client;
};

TEST(ChannelRole, IsSwitchedWhenTheRanksHaveDoneIt) {
  const ServerEnd instance;
  ClientEnd client;
  Rank rank(instance);
  rank.Begin();
  const uint64_t watching = rank.Watch(0);
  const uint64_t asked = client.Send(instance.port(), To(InstanceRole::kDecode));
  const Watched order = WatchedOf(rank.client.Wait(watching));
  ASSERT_TRUE(order.role.has_value());
  EXPECT_EQ(order.role->role, InstanceRole::kDecode);
  EXPECT_EQ(instance.roles->duties(), InstanceRole::kNone);
  rank.Declare(order.role->attempt);
  const SwitchStatus done = StatusOf(client.Wait(asked));
  EXPECT_EQ(done.state, SwitchState::kDone) << done.reason;
  EXPECT_EQ(done.role, InstanceRole::kDecode);
  EXPECT_EQ(instance.roles->duties(), InstanceRole::kDecode);
}

TEST(ChannelRole, SaysHowFarItIsWhenPatienceIsOver) {
  const ServerEnd instance;
  ClientEnd client;
  const LeaseToken lease = instance.Grant().token;
  const SwitchStatus status = StatusOf(client.Ask(instance.port(), To(InstanceRole::kDecode, 1, 1)));
  EXPECT_EQ(status.state, SwitchState::kDraining);
  EXPECT_EQ(status.leases, 1U);
  const uint64_t again = client.Send(instance.port(), To(InstanceRole::kDecode));
  EXPECT_TRUE(std::holds_alternative<Released>(client.Ask(instance.port(), Release{{lease}}).answer));
  EXPECT_EQ(StatusOf(client.Wait(again)).state, SwitchState::kDone);
}

TEST(ChannelRole, WhoeverWaitsForItIsToldOnce) {
  const ServerEnd instance;
  ClientEnd client;
  ClientEnd another;
  const LeaseToken lease = instance.Grant().token;
  const uint64_t first = client.Send(instance.port(), To(InstanceRole::kDecode, 1));
  ASSERT_EQ(StatusOf(client.Ask(instance.port(), To(InstanceRole::kDecode, 1, 1))).state, SwitchState::kDraining);
  const SwitchStatus refused = StatusOf(another.Ask(instance.port(), To(InstanceRole::kPrefill, 2)));
  EXPECT_EQ(refused.state, SwitchState::kRefused);
  EXPECT_EQ(refused.reason, "it is switching to decode just now");
  {
    ClientEnd leaves;
    ASSERT_EQ(StatusOf(leaves.Ask(instance.port(), To(InstanceRole::kDecode, 4, 1))).state, SwitchState::kDraining);
    leaves.Send(instance.port(), To(InstanceRole::kDecode, 4));
  }
  const uint64_t second = another.Send(instance.port(), To(InstanceRole::kDecode, 3));
  ASSERT_EQ(StatusOf(another.Ask(instance.port(), To(InstanceRole::kDecode, 3, 1))).state, SwitchState::kDraining);
  instance.leases->Release({lease});
  EXPECT_EQ(StatusOf(client.Wait(first)).state, SwitchState::kDone);
  EXPECT_EQ(StatusOf(another.Wait(second)).state, SwitchState::kDone);
}

TEST(ChannelRole, WhatIsHeldTooLongIsRevoked) {
  const ServerEnd instance;
  ClientEnd client;
  instance.Grant();
  EXPECT_EQ(StatusOf(client.Ask(instance.port(), To(InstanceRole::kDecode, 1, kMaxPatienceMs, 1))).state,
            SwitchState::kDone);
  EXPECT_EQ(instance.leases->held().leases, 0U);
}

TEST(ChannelRole, ARankThatCannotOrDoesNotAnswerRefusesIt) {
  const ServerEnd instance({}, 0, Anybody(), milliseconds(1));
  ClientEnd client;
  Rank rank(instance);
  rank.Begin();
  uint64_t watching = rank.Watch(0);
  uint64_t asked = client.Send(instance.port(), To(InstanceRole::kDecode, 1));
  const Watched order = WatchedOf(rank.client.Wait(watching));
  ASSERT_TRUE(order.role.has_value());
  rank.Declare(order.role->attempt, "a link is not gone");
  EXPECT_EQ(StatusOf(client.Wait(asked)).reason, "rank (pp 0, tp 1): a link is not gone");
  asked = client.Send(instance.port(), To(InstanceRole::kDecode, 2));
  const SwitchStatus refused = StatusOf(client.Wait(asked));
  EXPECT_EQ(refused.state, SwitchState::kRefused);
  EXPECT_EQ(refused.reason, "rank (pp 0, tp 1) has not answered");
  EXPECT_EQ(instance.roles->duties(), InstanceRole::kBoth);
  // Of the two orders only the last is of any use.
  watching = rank.Watch(order.number);
  const Watched last = WatchedOf(rank.client.Wait(watching));
  ASSERT_TRUE(last.role.has_value());
  EXPECT_GT(last.role->attempt, order.role->attempt);
  EXPECT_EQ(WatchedOf(rank.client.Wait(rank.Watch(last.number, 1))).number, 0U);
}

TEST(ChannelRole, OrdersThatNobodyTakesDoNotPileUp) {
  const ServerEnd instance({}, 0, Anybody(), milliseconds(1));
  ClientEnd client;
  Rank rank(instance);
  rank.Begin();
  StatusOf(client.Ask(instance.port(), To(InstanceRole::kDecode, 1)));
  StatusOf(client.Ask(instance.port(), To(InstanceRole::kPrefill, 2)));
  const Watched only = WatchedOf(rank.client.Wait(rank.Watch(0)));
  ASSERT_TRUE(only.role.has_value());
  EXPECT_EQ(only.number, 2U);
  EXPECT_EQ(only.role->role, InstanceRole::kPrefill);
}

TEST(ChannelRole, ARankThatWatchesLaterIsToldAndNotWaitedFor) {
  const ServerEnd instance;
  ClientEnd client;
  EXPECT_EQ(StatusOf(client.Ask(instance.port(), To(InstanceRole::kDecode))).state, SwitchState::kDone);
  Rank rank(instance);
  const Watched order = WatchedOf(rank.client.Wait(rank.Watch(0)));
  ASSERT_TRUE(order.role.has_value());
  EXPECT_EQ(order.role->role, InstanceRole::kDecode);
  rank.Declare(order.role->attempt, "that cannot be helped");
  EXPECT_EQ(instance.roles->duties(), InstanceRole::kDecode);
}

TEST(ChannelRole, AnInstanceThatWasNotStartedForItKeepsItsRole) {
  const auto leases = std::make_shared<LeaseTable>(kLong);
  const auto server = std::move(ChannelServer::Create(Loopback(), TheGrantor(), Anybody(), leases)).value();
  ClientEnd client;
  const SwitchStatus refused = StatusOf(client.Ask(server->port(), To(InstanceRole::kDecode)));
  EXPECT_EQ(refused.state, SwitchState::kRefused);
  EXPECT_EQ(refused.reason, "it was not started with role_switch");
}

TEST(ChannelRole, NobodyInParticularMayNotSwitch) {
  const ServerEnd instance;
  BareClient stranger(instance.port());
  ASSERT_TRUE(stranger.Greet()) << "insecure lets in anybody";
  ASSERT_TRUE(stranger.Send(MessageType::kSwitch, Encode(To(InstanceRole::kDecode))).ok());
  const Result<Frame> answer = stranger.Receive();
  ASSERT_TRUE(answer.ok());
  const SwitchStatus refused = Decode<SwitchStatus>(answer.value().body).value();
  EXPECT_EQ(refused.state, SwitchState::kRefused);
  EXPECT_NE(refused.reason.find("know its key"), std::string::npos) << refused.reason;
  EXPECT_EQ(instance.roles->duties(), InstanceRole::kBoth);
}

TEST(ChannelRole, WhoKnowsTheKeyMaySwitchOverTcp) {
  const KeyFile file(KeyLine('1'));
  const Trust trust{std::move(KeyRing::FromFile(file.path())).value(), false};
  const ServerEnd instance({}, 0, trust);
  Result<Fd> fd = DialTcp(Loopback(instance.port()), Soon());
  ASSERT_TRUE(fd.ok());
  FrameSocket socket(std::move(fd).value());
  ClientOpening opening(trust.keys->Keys());
  ASSERT_TRUE(SendFrame(socket, MessageType::kOpen, 0, opening.Open().value(), Soon()).ok());
  const Result<Frame> opened = RecvFrame(socket, TypeSet(MessageType::kOpened), Soon());
  ASSERT_TRUE(opened.ok()) << opened.status().text();
  ASSERT_TRUE(SendFrame(socket, MessageType::kProve, 0, opening.OnOpened(opened.value().body).value(), Soon()).ok());
  socket.out = FrameSeal(opening.session().to_server);
  socket.in = FrameSeal(opening.session().to_client);
  const ChannelGreeting greeting{{kProtocolVersion, kProtocolVersion}, kContentVersion};
  ASSERT_TRUE(SendFrame(socket, MessageType::kChannel, 0, Encode(greeting), Soon()).ok());
  ASSERT_TRUE(RecvFrame(socket, TypeSet(MessageType::kChannelReady), Soon()).ok());
  ASSERT_TRUE(SendFrame(socket, MessageType::kSwitch, 1, Encode(To(InstanceRole::kDecode)), Soon()).ok());
  const Result<Frame> answer = RecvFrame(socket, TypeSet(MessageType::kSwitched), Soon());
  ASSERT_TRUE(answer.ok()) << answer.status().text();
  const SwitchStatus done = Decode<SwitchStatus>(answer.value().body).value();
  EXPECT_EQ(done.state, SwitchState::kDone) << done.reason;
}

}  // namespace
}  // namespace datadist::testing
