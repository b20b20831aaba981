// Links of an endpoint with itself: by loopback, and by dialling one's own listener. What hixl's repeated links and
// the modes of both ends do to a link stands here as well: each is decided by the same handshake.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <thread>

#include "link/loopback.h"
#include "support/member.h"

namespace datadist::testing {
namespace {

using namespace llm_datadist;  // the codes, which every line here names
using datadist::test::PatternOf;
using ::testing::AnyOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr uint64_t kSelf = 5;
constexpr uint64_t kPeer = 77;

LinkOptions Forced(const char *kind) {
  LinkOptions options;
  options.forced_transport = kind;
  return options;
}

LinkOptions Hixl() {
  LinkOptions options;
  options.hixl_backend = true;
  return options;
}

class Loopback : public ::testing::TestWithParam<const char *> {
 protected:
  void Link(uint64_t peer_id) {
    const Status status = LinkLoopback(self_.endpoint(), self_.table(), {peer_id, peer_id, "loopback", ""});
    ASSERT_TRUE(status.ok()) << status.text();
    ASSERT_EQ(self_.table()->Find(peer_id)->Report().transport, GetParam());
  }
  Member self_{kSelf, Forced(GetParam())};
};

TEST_P(Loopback, PullsAndPushesExactly) {
  const int64_t one = self_.AddCache(1);
  const int64_t two = self_.AddCache(2);
  Link(kPeer);
  ASSERT_EQ(self_.Pull(kPeer, one, two, 1, 4, 3).code(), LLM_SUCCESS);
  EXPECT_EQ(self_.Bytes(two), Copied(1, 2, 1, 4, 3));
  EXPECT_EQ(self_.Bytes(one), PatternOf(Member::kShape, 1)) << "the source is left alone";
  const int64_t three = self_.AddCache(3);
  ASSERT_EQ(self_.Push(kPeer, one, three, 0, 6, 2).code(), LLM_SUCCESS);
  EXPECT_EQ(self_.Bytes(three), Copied(1, 3, 0, 6, 2));
  EXPECT_TRUE(self_.CanariesIntact());
}

TEST_P(Loopback, MovesBlocksWithinOneCache) {
  const int64_t cache = self_.AddCache(1);
  Link(kPeer);
  ASSERT_EQ(self_.Pull(kPeer, cache, cache, 0, 4, 4).code(), LLM_SUCCESS);
  EXPECT_EQ(self_.Bytes(cache), Copied(1, 1, 0, 4, 4));
  ASSERT_EQ(self_.Push(kPeer, cache, cache, 4, 0, 4).code(), LLM_SUCCESS);
  EXPECT_EQ(self_.Bytes(cache), Copied(1, 1, 0, 4, 4));
}

TEST_P(Loopback, RefusesWhatAnyLinkRefuses) {
  const int64_t cache = self_.AddCache(1);
  Link(kPeer);
  EXPECT_EQ(self_.Pull(kPeer, cache + 1, cache, 0, 1, 1).code(), LLM_KV_CACHE_NOT_EXIST);
  EXPECT_EQ(self_.Pull(kPeer, cache, cache, 7, 0, 2).code(), LLM_PARAM_INVALID);
  EXPECT_TRUE(self_.Linked(kPeer));
  EXPECT_EQ(self_.Bytes(cache), PatternOf(Member::kShape, 1));
}

TEST_P(Loopback, UnlinkEndsItAndItCanBeMadeAgain) {
  const int64_t cache = self_.AddCache(1);
  for (int round = 0; round < 5; ++round) {
    Link(kPeer);
    ASSERT_EQ(self_.Pull(kPeer, cache, cache, 0, 4, 4).code(), LLM_SUCCESS);
    ASSERT_EQ(self_.Unlink(kPeer).code(), LLM_SUCCESS);
    ASSERT_EQ(self_.Pull(kPeer, cache, cache, 0, 4, 4).code(), LLM_NOT_YET_LINK);
  }
}

TEST_P(Loopback, ClosingItIsNoLossToItsOtherHalf) {
  Link(kPeer);
  const std::shared_ptr<datadist::Link> link = self_.table()->Find(kPeer);
  ::testing::internal::CaptureStderr();
  self_.table()->Remove(link.get());
  link->Close("unlinked by force");
  for (int turn = 0; turn < 3; ++turn) {
    self_.endpoint()->loop()->Run([] {});  // what the closing caused has run by then
  }
  EXPECT_THAT(::testing::internal::GetCapturedStderr(), Not(HasSubstr("lost")));
}

TEST_P(Loopback, TransfersRunWhileOtherLinksComeAndGo) {
  const int64_t source = self_.AddCache(1);
  const int64_t sink = self_.AddCache(2);
  Link(kPeer);
  std::thread busy([&] {
    for (int i = 0; i < 50; ++i) {
      ASSERT_EQ(self_.Pull(kPeer, source, sink, 0, 0, 8).code(), LLM_SUCCESS);
    }
  });
  for (int round = 0; round < 10; ++round) {
    Link(kPeer + 1);
    EXPECT_EQ(self_.Unlink(kPeer + 1).code(), LLM_SUCCESS);
  }
  busy.join();
  EXPECT_EQ(self_.Bytes(sink), PatternOf(Member::kShape, 1));
}

INSTANTIATE_TEST_SUITE_P(Transports, Loopback,
                         ::testing::Values("local", "cma", "tcp"),
                         [](const auto &kind) { return std::string(kind.param); });

class SelfLink : public ::testing::Test {
 protected:
  Member self_{kSelf};
  const SocketAddress address_ = self_.Listen();
};

TEST_F(SelfLink, DiallingOnesOwnListenerLinksUnderOnesOwnId) {
  for (const uint64_t expected : {uint64_t{0}, kSelf}) {
    SCOPED_TRACE(expected);
    ASSERT_EQ(self_.Dial(address_, expected).code(), LLM_SUCCESS);
    const std::shared_ptr<Link> link = self_.table()->Find(kSelf);
    ASSERT_NE(link, nullptr);
    EXPECT_TRUE(link->alive());
    EXPECT_EQ(link->caller_id(), expected);
    EXPECT_EQ(link->peer_address(), address_.ToString());
    const int64_t one = self_.AddCache(1);
    const int64_t two = self_.AddCache(2);
    ASSERT_EQ(self_.Push(kSelf, one, two, 0, 1, 7).code(), LLM_SUCCESS);
    EXPECT_EQ(self_.Bytes(two), Copied(1, 2, 0, 1, 7));
    EXPECT_EQ(self_.Unlink(kSelf).code(), LLM_SUCCESS);
  }
}

TEST_F(SelfLink, LiveOneIsAlreadyLinkedUnlessTheCallerNamesAnother) {
  ASSERT_EQ(self_.Dial(address_, kSelf).code(), LLM_SUCCESS);
  EXPECT_EQ(self_.Dial(address_, kSelf).code(), LLM_ALREADY_LINK);
  const std::shared_ptr<Link> first = self_.table()->Find(kSelf);
  EXPECT_EQ(self_.Dial(address_, 0).code(), LLM_SUCCESS) << "id 0 relinks";
  EXPECT_FALSE(first->alive());
  EXPECT_TRUE(self_.Linked(kSelf));
}

TEST_F(SelfLink, AnotherEndpointOfTheSameIdIsRefused) {
  Member twin(kSelf);
  const Status status = twin.Dial(address_, 0);
  EXPECT_EQ(status.code(), LLM_PARAM_INVALID);
  EXPECT_THAT(status.text(), HasSubstr("cluster id 5"));
}

TEST_F(SelfLink, SaysNothingInTheLog) {
  ::testing::internal::CaptureStderr();
  const Status status = self_.Dial(address_, 0);
  // The acceptor has read the end of the abandoned connection when it answers the next one.
  Member other(kPeer);
  const Status next = other.Dial(address_, 0);
  const std::string log = ::testing::internal::GetCapturedStderr();
  EXPECT_TRUE(status.ok()) << status.text();
  EXPECT_TRUE(next.ok()) << next.text();
  EXPECT_THAT(log, Not(HasSubstr("WARNING")));
}

TEST(AccessMode, DifferentModesAreRefusedAndNamed) {
  LinkOptions two_sided;
  two_sided.remote_accessible = false;
  Member one(kSelf, two_sided);
  Member other(kPeer);
  for (const auto &[client, server] : {std::pair(&one, &other), std::pair(&other, &one)}) {
    const Status status = client->Dial(server->Listen(), server->id());
    EXPECT_EQ(status.code(), LLM_PARAM_INVALID);
    EXPECT_THAT(status.text(), HasSubstr("llm.EnableRemoteCacheAccessible"));
    EXPECT_THAT(status.text(), HasSubstr("0 at cluster 5"));
    EXPECT_THAT(status.text(), HasSubstr("1 at cluster 77"));
    EXPECT_FALSE(client->Linked(server->id()));
  }
  Member second(6, two_sided);
  EXPECT_EQ(second.Dial(one.Listen(), kSelf).code(), LLM_SUCCESS);
}

// Only two-sided ends may have one id. Whoever is linked keeps that link: the other's dial, made at the same moment,
// must not replace it.
TEST(AccessMode, TwoSidedEndsOfOneIdThatDialEachOtherAgreeOnOneLink) {
  LinkOptions two_sided;
  two_sided.remote_accessible = false;
  std::array<Member, 2> ends{Member{kSelf, two_sided}, Member{kSelf, two_sided}};
  const std::array<SocketAddress, 2> addresses{ends[0].Listen(), ends[1].Listen()};
  for (int round = 0; round < 100; ++round) {
    std::atomic<int> starting{2};
    std::array<LinkToken, 2> tokens{};
    const auto dial = [&](size_t i) {
      for (--starting; starting > 0;) {
      }
      Status status(LLM_PROCESSING_LINK, "");
      while (status.code() == LLM_PROCESSING_LINK) {
        status = ends[i].Dial(addresses[1 - i], kSelf);
      }
      EXPECT_THAT(status.code(), AnyOf(LLM_SUCCESS, LLM_ALREADY_LINK)) << status.text();
      ASSERT_TRUE(ends[i].Linked(kSelf)) << "replaced by the other's, in round " << round;
      tokens[i] = ends[i].table()->Find(kSelf)->token();
    };
    std::thread other(dial, size_t{1});
    dial(0);
    other.join();
    ASSERT_EQ(tokens[0], tokens[1]) << "round " << round;
    ASSERT_EQ(ends[0].Unlink(kSelf).code(), LLM_SUCCESS);
    while (ends[1].Linked(kSelf)) {
      std::this_thread::yield();
    }
  }
}

class HixlPair : public ::testing::Test {
 protected:
  Member one_{kSelf, Hixl()};
  Member two_{kPeer, Hixl()};
  const SocketAddress one_at_ = one_.Listen();
  const SocketAddress two_at_ = two_.Listen();
};

TEST_F(HixlPair, RepeatedLinkIsAlreadyLinkedAlsoToWhoeverAnswers) {
  ASSERT_EQ(one_.Dial(two_at_, kPeer).code(), LLM_SUCCESS);
  for (const uint64_t expected : {kPeer, uint64_t{0}}) {
    EXPECT_EQ(one_.Dial(two_at_, expected).code(), LLM_ALREADY_LINK) << expected;
  }
  EXPECT_TRUE(one_.Linked(kPeer));
  EXPECT_TRUE(Eventually([&] { return two_.Linked(kSelf); }));
}

TEST_F(HixlPair, LinkThatOnlyThePeerAskedForIsASuccessOnce) {
  ASSERT_EQ(one_.Dial(two_at_, kPeer).code(), LLM_SUCCESS);
  ASSERT_TRUE(Eventually([&] { return two_.Linked(kSelf); }));
  ::testing::internal::CaptureStderr();
  const std::shared_ptr<Link> link = two_.table()->Find(kSelf);
  const Status back = two_.Dial(one_at_, kSelf);
  const Status again = two_.Dial(one_at_, 0);
  const std::string log = ::testing::internal::GetCapturedStderr();
  EXPECT_EQ(back.code(), LLM_SUCCESS) << back.text();
  EXPECT_EQ(again.code(), LLM_ALREADY_LINK);
  EXPECT_EQ(two_.table()->Find(kSelf), link) << "the link is the one that was there";
  EXPECT_THAT(log, Not(HasSubstr("WARNING")));
}

TEST_F(HixlPair, LostLinkIsMadeAnew) {
  ASSERT_EQ(one_.Dial(two_at_, kPeer).code(), LLM_SUCCESS);
  two_.table()->Find(kSelf)->Close("lost for the test");
  ASSERT_TRUE(Eventually([&] { return !one_.Linked(kPeer); }));
  EXPECT_EQ(one_.Dial(two_at_, kPeer).code(), LLM_SUCCESS);
  EXPECT_TRUE(Eventually([&] { return two_.Linked(kSelf); }));
}

}  // namespace
}  // namespace datadist::testing

int main(int argc, char **argv) {
  // Read once, by the first line that is logged: what must not be warned of would not be seen otherwise.
  ::setenv("ASCEND_GLOBAL_LOG_LEVEL", "2", 1);
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
