// Comms: two to four endpoints that all make the same call.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "support/comm_members.h"

namespace datadist::testing {
namespace {

using namespace llm_datadist;  // the codes, which every line here names
using datadist::test::PatternOf;
using ::testing::AllOf;
using ::testing::HasSubstr;

using Group = std::vector<std::unique_ptr<Member>>;

Group MakeGroup(size_t count) {
  Group group;
  for (uint64_t id = 1; id <= count; ++id) {
    group.push_back(std::make_unique<Member>(id));
  }
  return group;
}

void ExpectEveryPairMovesBytes(const Group &group) {
  for (const auto &from : group) {
    for (const auto &to : group) {
      if (from == to) {
        continue;
      }
      const uint64_t seed = from->id() * 10;
      const int64_t source = from->AddCache(seed);
      const int64_t sink = to->AddCache(seed + 1);
      const Status pulled = to->Pull(from->id(), source, sink, 2, 5, 3);
      ASSERT_TRUE(pulled.ok()) << pulled.text();
      EXPECT_EQ(to->Bytes(sink), Copied(seed, seed + 1, 2, 5, 3));
      EXPECT_TRUE(to->CanariesIntact());
    }
  }
}

class Comms : public ::testing::TestWithParam<size_t> {};

TEST_P(Comms, EveryPairIsLinkedAndUnlinked) {
  const Group group = MakeGroup(GetParam());
  const std::vector<CommMember> members = Members(GetParam());
  std::vector<int64_t> ids;
  for (const auto &member : group) {
    ids.push_back(MustLink(*member, "all", members));
    EXPECT_EQ(ids.back(), 1) << "ids count from 1 in each endpoint";
  }
  for (size_t i = 0; i < group.size(); ++i) {
    ExpectOk(*group[i], ids[i]);
  }
  ExpectEveryPairMovesBytes(group);
  for (size_t i = 0; i < group.size(); ++i) {
    EXPECT_TRUE(group[i]->comms().Unlink(ids[i]).ok());
    EXPECT_TRUE(group[i]->comms().Empty());
    EXPECT_TRUE(group[i]->table()->Empty());
  }
}

TEST_P(Comms, MembersMayComeInAnyOrder) {
  const std::vector<CommMember> members = Members(GetParam());
  const Group group = MakeGroup(GetParam());
  // The highest rank, which dials all the others, first: nobody listens yet.
  std::vector<int64_t> ids;
  for (auto member = group.rbegin(); member != group.rend(); ++member) {
    for (size_t i = 0; i < ids.size(); ++i) {
      EXPECT_EQ(group[group.size() - 1 - i]->comms().Query(ids[i]).value().state, CommState::kPreparing);
    }
    ids.push_back(MustLink(**member, "all", members));
  }
  for (size_t i = 0; i < ids.size(); ++i) {
    ExpectOk(*group[group.size() - 1 - i], ids[i]);
  }
}

TEST_P(Comms, UnlinkOfAllAtOnceAndLinkAgain) {
  const std::vector<CommMember> members = Members(GetParam());
  const Group group = MakeGroup(GetParam());
  std::vector<std::thread> threads;
  for (const auto &member : group) {
    threads.emplace_back([&members, self = member.get()] {
      for (int round = 0; round < 10; ++round) {
        const int64_t id = MustLink(*self, "again", members);
        ExpectOk(*self, id);
        EXPECT_TRUE(self->comms().Unlink(id).ok());
      }
    });
  }
  for (std::thread &thread : threads) {
    thread.join();
  }
}

TEST_P(Comms, WithoutAddressesTheOthersAreLoopbackPeers) {
  Member self(2);
  const int64_t id = MustLink(self, "loop", WithoutAddresses(Members(GetParam())));
  ExpectOk(self, id);
  const int64_t one = self.AddCache(1);
  for (uint64_t peer = 1; peer <= GetParam(); ++peer) {
    EXPECT_EQ(self.Linked(peer), peer != self.id());
    if (peer != self.id()) {
      const int64_t two = self.AddCache(2);
      ASSERT_TRUE(self.Pull(peer, one, two, 0, 1, 7).ok());
      EXPECT_EQ(self.Bytes(two), Copied(1, 2, 0, 1, 7));
    }
  }
  EXPECT_TRUE(self.comms().Unlink(id).ok());
  EXPECT_TRUE(self.table()->Empty());
}

INSTANTIATE_TEST_SUITE_P(Members, Comms, ::testing::Values(2, 3, 4),
                         [](const auto &count) { return std::to_string(count.param); });

class TwoMembers : public ::testing::Test {
 protected:
  void LinkBoth() {
    low_id_ = MustLink(low_, "pair", members_);
    high_id_ = MustLink(high_, "pair", members_);
    ExpectOk(low_, low_id_);
    ExpectOk(high_, high_id_);
  }
  const std::vector<CommMember> members_ = Members(2);
  Member low_{1};
  Member high_{2};
  int64_t low_id_ = 0;
  int64_t high_id_ = 0;
};

TEST_F(TwoMembers, NotReadyUntilOk) {
  EXPECT_TRUE(low_.comms().CheckReady(2).ok()) << "a cluster of no comm is none of our business";
  low_id_ = MustLink(low_, "pair", members_);
  const Status status = low_.comms().CheckReady(2);
  EXPECT_EQ(status.code(), LLM_NOT_YET_LINK);
  EXPECT_THAT(status.text(), AllOf(HasSubstr("cluster 2"), HasSubstr("'pair'"), HasSubstr("prepared")));
  EXPECT_TRUE(low_.comms().CheckReady(3).ok());
  ExpectOk(high_, MustLink(high_, "pair", members_));
  ExpectOk(low_, low_id_);
  EXPECT_TRUE(low_.comms().CheckReady(2).ok());
}

TEST_F(TwoMembers, LinkedPairIsNotReadyWhileTheThirdIsMissing) {
  const std::vector<CommMember> three = Members(3);
  low_id_ = MustLink(low_, "three", three);
  high_id_ = MustLink(high_, "three", three);
  ASSERT_TRUE(Eventually([&] { return low_.Linked(2) && high_.Linked(1); }));
  EXPECT_EQ(low_.comms().CheckReady(2).code(), LLM_NOT_YET_LINK);
  EXPECT_EQ(high_.comms().CheckReady(1).code(), LLM_NOT_YET_LINK);
  Member third(3);
  ExpectOk(third, MustLink(third, "three", three));
  ExpectOk(low_, low_id_);
  ExpectOk(high_, high_id_);
  EXPECT_TRUE(low_.comms().CheckReady(2).ok());
}

TEST_F(TwoMembers, FailedCommSaysWhoIsMissingAndTakesItsLinksAlong) {
  const std::vector<CommMember> three = Members(3);
  low_id_ = MustLink(low_, "three", three, kShort);
  high_id_ = MustLink(high_, "three", three, kShort);
  for (const auto &[member, id, peer] : {std::tuple(&low_, low_id_, 2U), std::tuple(&high_, high_id_, 1U)}) {
    const CommTable::Report report = member->Settled(id);
    EXPECT_EQ(report.state, CommState::kFailed);
    EXPECT_THAT(report.reason, AllOf(HasSubstr("cluster 3 (rank 2)"), HasSubstr("1 s"), HasSubstr("never linked")));
    const Status status = member->comms().CheckReady(peer);
    EXPECT_EQ(status.code(), LLM_NOT_YET_LINK);
    EXPECT_THAT(status.text(), HasSubstr("failed"));
  }
  EXPECT_TRUE(Eventually([&] { return low_.table()->Empty() && high_.table()->Empty(); }));
  EXPECT_TRUE(low_.comms().Unlink(low_id_).ok());
  EXPECT_EQ(low_.comms().Query(low_id_).status().code(), LLM_NOT_YET_LINK);
  EXPECT_EQ(low_.comms().Unlink(low_id_).code(), LLM_NOT_YET_LINK);
}

TEST_F(TwoMembers, DiallerWhosePeerNeverComesSaysWhy) {
  high_id_ = MustLink(high_, "pair", members_, kShort);
  const CommTable::Report report = high_.Settled(high_id_);
  EXPECT_EQ(report.state, CommState::kFailed);
  EXPECT_THAT(report.reason, AllOf(HasSubstr("cluster 1 (rank 0)"), HasSubstr(members_[0].address->ToString())));
}

TEST_F(TwoMembers, OtherNamesDoNotMeet) {
  low_id_ = MustLink(low_, "one", members_, kShort);
  high_id_ = MustLink(high_, "other", members_, kShort);
  const CommTable::Report report = high_.Settled(high_id_);
  EXPECT_EQ(report.state, CommState::kFailed);
  EXPECT_THAT(report.reason, HasSubstr("does not wait for cluster 2 in comm 'other'"));
  EXPECT_EQ(low_.Settled(low_id_).state, CommState::kFailed);
}

TEST_F(TwoMembers, WrongClusterAtAnAddressFailsAtOnce) {
  std::vector<CommMember> wrong = members_;
  wrong[0].cluster_id = 9;
  low_id_ = MustLink(low_, "pair", members_);
  high_id_ = MustLink(high_, "pair", wrong);
  const CommTable::Report report = high_.Settled(high_id_);
  EXPECT_EQ(report.state, CommState::kFailed);
  EXPECT_THAT(report.reason, HasSubstr("cluster 1 listens there, not cluster 9"));
}

TEST_F(TwoMembers, DifferentAccessModesFailAndBothSayWhy) {
  LinkOptions two_sided;
  two_sided.remote_accessible = false;
  Member other(2, two_sided);
  low_id_ = MustLink(low_, "pair", members_, kShort);
  const int64_t other_id = MustLink(other, "pair", members_);
  for (const std::string &reason : {other.Settled(other_id).reason, low_.Settled(low_id_).reason}) {
    EXPECT_THAT(reason, AllOf(HasSubstr("llm.EnableRemoteCacheAccessible"), HasSubstr("1 at cluster 1"),
                              HasSubstr("0 at cluster 2")));
  }
}

TEST_F(TwoMembers, LinkOfAClientIsNotTakenOver) {
  ASSERT_TRUE(high_.Dial(low_.Listen(), 1).ok());
  low_id_ = MustLink(low_, "pair", members_, kShort);
  high_id_ = MustLink(high_, "pair", members_);
  const CommTable::Report report = high_.Settled(high_id_);
  EXPECT_EQ(report.state, CommState::kFailed);
  EXPECT_THAT(report.reason, HasSubstr("linked already"));
  EXPECT_TRUE(high_.Linked(1));
  EXPECT_TRUE(high_.comms().CheckReady(1).ok()) << "the client's link works";
  EXPECT_TRUE(high_.comms().Unlink(high_id_).ok());
  EXPECT_TRUE(high_.Linked(1));
}

TEST_F(TwoMembers, MemberThatDiesLosesItsLinkAndTheCommGoesOn) {
  auto mortal = std::make_unique<Member>(2);
  low_id_ = MustLink(low_, "pair", members_);
  ExpectOk(*mortal, MustLink(*mortal, "pair", members_));
  ExpectOk(low_, low_id_);
  mortal.reset();
  ASSERT_TRUE(Eventually([&] { return !low_.Linked(2); }));
  EXPECT_EQ(low_.comms().Query(low_id_).value().state, CommState::kOk);
  EXPECT_EQ(low_.Pull(2, 1, low_.AddCache(1), 0, 0, 1).code(), LLM_FAILED);
  EXPECT_TRUE(low_.comms().Unlink(low_id_).ok());
  EXPECT_TRUE(low_.table()->Empty());
  LinkBoth();
}

TEST_F(TwoMembers, MemberThatMissedTheLastAnswerDialsAgainIntoACompleteComm) {
  LinkBoth();
  const std::shared_ptr<Link> link = high_.table()->Find(1);
  high_.table()->Remove(link.get());
  link->Close("as if the handshake had failed at its last step");
  EXPECT_EQ(high_.Dial(*members_[0].address, 1, "pair", high_id_ + 1).code(), LLM_NOT_YET_LINK) << "a later comm";
  EXPECT_TRUE(high_.Dial(*members_[0].address, 1, "pair", high_id_).ok());
  EXPECT_TRUE(Eventually([&] { return low_.Linked(2); }));
}

TEST_F(TwoMembers, MemberThatGaveUpMayComeAgainWhileTheThirdIsMissing) {
  const std::vector<CommMember> three = Members(3);
  low_id_ = MustLink(low_, "three", three);
  for (int attempt = 0; attempt < 5; ++attempt) {
    high_id_ = MustLink(high_, "three", three);
    ASSERT_TRUE(Eventually([&] { return high_.Linked(1); }));
    ASSERT_TRUE(high_.comms().Unlink(high_id_).ok());
  }
  high_id_ = MustLink(high_, "three", three);
  Member third(3);
  ExpectOk(third, MustLink(third, "three", three));
  ExpectOk(low_, low_id_);
  ExpectOk(high_, high_id_);
}

TEST_F(TwoMembers, MemberThatUnlinkedIsNotTakenIntoTheSameCommAgain) {
  const std::vector<CommMember> three = Members(3);
  low_id_ = MustLink(low_, "three", three);
  high_id_ = MustLink(high_, "three", three);
  auto third = std::make_unique<Member>(3);
  ExpectOk(*third, MustLink(*third, "three", three));
  ExpectOk(high_, high_id_);
  ASSERT_TRUE(high_.comms().Unlink(high_id_).ok());
  EXPECT_EQ(high_.Dial(*three[0].address, 1, "three", high_id_ + 1).code(), LLM_NOT_YET_LINK);
  ExpectOk(low_, low_id_);
}

TEST_F(TwoMembers, MemberThatUnlinkedIsNotTakenForOneThatDialsAgain) {
  LinkBoth();
  ASSERT_TRUE(high_.comms().Unlink(high_id_).ok());
  EXPECT_EQ(high_.Dial(*members_[0].address, 1, "pair", high_id_).code(), LLM_NOT_YET_LINK);
}

TEST_F(TwoMembers, UnlinkWaitsForTheTransferThatRuns) {
  LinkBoth();
  const int64_t source = low_.AddCache(1);
  const int64_t sink = high_.AddCache(2);
  std::atomic<bool> started{false};
  std::thread puller([&] {
    Status status = Status::Ok();
    while (status.ok()) {
      status = high_.Pull(1, source, sink, 0, 0, 8);
      started.store(true);
    }
    EXPECT_EQ(status.code(), LLM_NOT_YET_LINK) << status.text();
  });
  ASSERT_TRUE(Eventually([&] { return started.load(); }));
  EXPECT_TRUE(high_.comms().Unlink(high_id_).ok());
  puller.join();
  EXPECT_EQ(high_.Bytes(sink), PatternOf(Member::kShape, 1)) << "no pull was cut short";
}

TEST_F(TwoMembers, UnlinkWhilePreparingReturnsSoon) {
  low_id_ = MustLink(low_, "pair", members_);
  high_id_ = MustLink(high_, "absent", Members(2));
  const auto start = std::chrono::steady_clock::now();
  EXPECT_TRUE(low_.comms().Unlink(low_id_).ok());
  EXPECT_TRUE(high_.comms().Unlink(high_id_).ok());
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
  LinkBoth();
}

TEST_F(TwoMembers, StopEndsWhatIsPreparingAndRefusesMore) {
  MustLink(low_, "pair", members_);
  low_.comms().Stop();
  EXPECT_TRUE(low_.comms().Empty());
  EXPECT_EQ(low_.comms().Link("other", members_, kLong).status().code(), LLM_FAILED);
  EXPECT_TRUE(Listen(*members_[0].address).ok()) << "the listener is closed";
}

TEST_F(TwoMembers, ListenerClosesWithTheLastCommThatUsesIt) {
  std::vector<CommMember> others = Members(2);
  others[0].address = members_[0].address;
  others[1].cluster_id = 3;
  low_id_ = MustLink(low_, "pair", members_);
  const int64_t second = MustLink(low_, "second", others);
  EXPECT_EQ(Listen(*members_[0].address).status().code(), LLM_FAILED);
  EXPECT_TRUE(low_.comms().Unlink(low_id_).ok());
  Member third(3);
  ExpectOk(third, MustLink(third, "second", others));
  ExpectOk(low_, second);
  EXPECT_TRUE(low_.comms().Unlink(second).ok());
  EXPECT_TRUE(Listen(*members_[0].address).ok());
}

TEST_F(TwoMembers, AddressInUseIsRefusedByName) {
  const Result<Listeners> squatter = Listen(*members_[0].address);
  ASSERT_TRUE(squatter.ok());
  const Result<int64_t> id = low_.comms().Link("pair", members_, kLong);
  EXPECT_EQ(id.status().code(), LLM_FAILED);
  EXPECT_THAT(id.status().text(), AllOf(HasSubstr("'pair'"), HasSubstr(members_[0].address->ToString())));
  EXPECT_TRUE(low_.comms().Empty());
}

TEST_F(TwoMembers, EndpointsOwnListenerServesACommWithItsAddress) {
  std::vector<CommMember> members = members_;
  members[0].address = low_.Listen();
  low_id_ = MustLink(low_, "pair", members);
  high_id_ = MustLink(high_, "pair", members);
  ExpectOk(low_, low_id_);
  ExpectOk(high_, high_id_);
}

TEST_F(TwoMembers, ListenerOfACommTakesNoClients) {
  low_id_ = MustLink(low_, "pair", members_);
  const Status status = high_.Dial(*members_[0].address, 1);
  EXPECT_EQ(status.code(), LLM_LINK_FAILED);
  EXPECT_THAT(status.text(), HasSubstr("bilateral"));
}

}  // namespace
}  // namespace datadist::testing
