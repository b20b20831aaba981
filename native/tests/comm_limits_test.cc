// What a comm refuses, and how many there may be.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/socket_io.h"
#include "support/comm_members.h"

namespace datadist::testing {
namespace {

using namespace llm_datadist;  // the codes, which every line here names
using ::testing::HasSubstr;

TEST(CommLimits, AtMostThatManyComms) {
  Member self(1, {}, 2);
  std::vector<CommMember> members = WithoutAddresses(Members(2));
  ExpectOk(self, MustLink(self, "a", members));
  members[1].cluster_id = 3;
  const int64_t second = MustLink(self, "b", members);
  ExpectOk(self, second);
  members[1].cluster_id = 4;
  const Result<int64_t> third = self.comms().Link("c", members, kLong);
  EXPECT_EQ(third.status().code(), LLM_PARAM_INVALID);
  EXPECT_THAT(third.status().text(), HasSubstr("at most 2"));
  EXPECT_TRUE(self.comms().Unlink(second).ok());
  EXPECT_EQ(MustLink(self, "c", members), 3) << "ids are not used again";
}

TEST(CommLimits, SixteenPrepareAtATimeTheNextWaitsItsTurn) {
  Member self(2);
  // Peers that never answer. A dial that one of them sees says that a comm has its turn.
  std::vector<Listeners> silent;
  int64_t first = 0;
  for (uint64_t i = 0; i < 16; ++i) {
    silent.push_back(Listen(FreeAddress()).value());
    std::vector<CommMember> members = Members(2);
    members[0].cluster_id = 100 + i;
    members[0].address = SocketAddress::LocalOf(silent.back().tcp.get());
    const int64_t id = MustLink(self, "silent " + std::to_string(i), members);
    first = first == 0 ? id : first;
    ASSERT_TRUE(WaitReadable(silent.back().local.get(), Deadline::In(kPatience)).ok());
  }
  const std::vector<CommMember> at_hand = WithoutAddresses(Members(2));
  const int64_t waiting = MustLink(self, "at hand", at_hand);
  // The same work elsewhere: what would be done by now if it had its turn.
  Member other(2);
  for (int i = 0; i < 3; ++i) {
    const int64_t id = MustLink(other, "at hand", at_hand);
    ExpectOk(other, id);
    EXPECT_TRUE(other.comms().Unlink(id).ok());
  }
  EXPECT_EQ(self.comms().Query(waiting).value().state, CommState::kPreparing);
  const int64_t cancelled = MustLink(self, "cancelled", Members(2));
  EXPECT_TRUE(self.comms().Unlink(cancelled).ok()) << "without its turn";
  silent.clear();
  EXPECT_TRUE(self.comms().Unlink(first).ok());
  ExpectOk(self, waiting);
}

TEST(CommLimits, SilentMembersDoNotKeepTheOthersFromTheirTurn) {
  Member self(4);
  Member third(3);
  std::vector<CommMember> members = Members(4);
  std::vector<Listeners> silent;
  for (CommMember *const member : {&members[0], &members[1]}) {
    silent.push_back(Listen(*member->address).value());
  }
  MustLink(third, "all", members);
  MustLink(self, "all", members);
  EXPECT_TRUE(Eventually([&] { return self.Linked(3) && third.Linked(4); }));
}

TEST(CommLimits, WithoutAThreadToDialTheCommFails) {
  Member self(2);
  TaskRunner none(1);
  none.Stop();
  const std::vector<CommMember> members = Members(2);
  bool turn_over = false;
  const auto comm = std::make_shared<Comm>(self.endpoint(), self.table(), none,
                                           CommPlan{1, "dials", members[1], {members[0]}, kLong},
                                           [&] { turn_over = true; });
  self.endpoint()->loop()->Run([&] { comm->PrepareOnLoop(); });
  EXPECT_EQ(comm->Report().state, CommState::kFailed);
  EXPECT_THAT(comm->Report().reason, HasSubstr("no thread to dial cluster 1"));
  EXPECT_TRUE(turn_over);
}

TEST(CommLimits, LinksOfCommsCountAsLinks) {
  LinkOptions options;
  options.max_links = 1;
  Member self(1, options);
  const int64_t id = MustLink(self, "loop", WithoutAddresses(Members(3)));
  const CommTable::Report report = self.Settled(id);
  EXPECT_EQ(report.state, CommState::kFailed);
  EXPECT_THAT(report.reason, HasSubstr("at most 1"));
  EXPECT_TRUE(self.table()->Empty());
}

class CommArguments : public ::testing::Test {
 protected:
  void ExpectInvalid(const std::string &name, const std::vector<CommMember> &members, const char *text) {
    const Result<int64_t> id = self_.comms().Link(name, members, kLong);
    EXPECT_EQ(id.status().code(), LLM_PARAM_INVALID);
    EXPECT_THAT(id.status().text(), HasSubstr(text));
    EXPECT_TRUE(self_.comms().Empty());
  }
  Member self_{1};
  std::vector<CommMember> members_ = Members(3);
};

TEST_F(CommArguments, NameIsTooShortOrTooLong) {
  ExpectInvalid("", members_, "comm_name: 0 bytes");
  ExpectInvalid(std::string(128, 'x'), members_, "allowed: 1..127");
}

TEST_F(CommArguments, TooFewOrTooManyMembers) {
  ExpectInvalid("x", {members_[0]}, "members: 1, allowed: 2..4");
  ExpectInvalid("x", Members(5), "members: 5");
}

TEST_F(CommArguments, OwnIdIsMissing) {
  members_[0].cluster_id = 7;
  ExpectInvalid("x", members_, "our own cluster id 1 is missing");
}

TEST_F(CommArguments, IdComesTwice) {
  members_[2].cluster_id = 2;
  ExpectInvalid("x", members_, "members[2].cluster_id: 2 comes twice");
}

TEST_F(CommArguments, RanksDoNotAscend) {
  members_[2].rank = 1;
  ExpectInvalid("x", members_, "members[2].rank: 1 after 1");
}

TEST_F(CommArguments, SomeHaveAddressesSomeHaveNot) {
  members_[1].address.reset();
  ExpectInvalid("x", members_, "members[1].address");
}

TEST_F(CommArguments, PortZero) {
  members_[1].address = SocketAddress::FromIp("127.0.0.1", 0).value();
  ExpectInvalid("x", members_, "port above 0");
}

// A rank table opens a door, too: as everywhere, who opens it to other hosts must say who may enter.
TEST_F(CommArguments, AddressThatOthersReach) {
  members_[0].address = SocketAddress::FromIp("0.0.0.0", 45678).value();
  ExpectInvalid("x", members_, "0.0.0.0:45678 can be reached by other hosts");
}

TEST_F(CommArguments, NameInUse) {
  const int64_t id = MustLink(self_, "x", members_);
  const Result<int64_t> again = self_.comms().Link("x", members_, kLong);
  EXPECT_EQ(again.status().code(), LLM_PARAM_INVALID);
  EXPECT_THAT(again.status().text(), HasSubstr("'x' is in use"));
  EXPECT_TRUE(self_.comms().Unlink(id).ok());
  MustLink(self_, "x", members_);
}

TEST_F(CommArguments, UnknownCommIds) {
  for (const int64_t id : {int64_t{0}, int64_t{-1}, int64_t{1}}) {
    EXPECT_EQ(self_.comms().Query(id).status().code(), LLM_NOT_YET_LINK);
    EXPECT_EQ(self_.comms().Unlink(id).code(), LLM_NOT_YET_LINK);
  }
}

}  // namespace
}  // namespace datadist::testing
