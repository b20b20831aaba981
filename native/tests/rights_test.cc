// What peers may do with an endpoint's caches, on every transport: read, write, neither.
#include <gtest/gtest.h>

#include "support/member.h"

namespace datadist::testing {
namespace {

using llm_datadist::LLM_PARAM_INVALID;
using llm_datadist::LLM_SUCCESS;

class Rights : public ::testing::TestWithParam<const char *> {
 protected:
  static LinkOptions Forced() {
    LinkOptions options;
    options.forced_transport = GetParam();
    return options;
  }
  static RegionLimits With(PeerAccess access) {
    RegionLimits limits;
    limits.peer_access = access;
    return limits;
  }
};

TEST_P(Rights, AreWhatTheOwnerGives) {
  struct Case {
    PeerAccess access;
    llm_datadist::Status pull;
    llm_datadist::Status push;
  };
  for (const Case &test : {Case{PeerAccess::kReadWrite, LLM_SUCCESS, LLM_SUCCESS},
                           Case{PeerAccess::kRead, LLM_SUCCESS, LLM_PARAM_INVALID},
                           Case{PeerAccess::kNone, LLM_PARAM_INVALID, LLM_PARAM_INVALID}}) {
    Member owner(2, Forced(), 512, With(test.access));
    Member peer(1, Forced());
    ASSERT_TRUE(peer.Dial(owner.Listen(), 2).ok());
    const int64_t theirs = owner.AddCache(5);
    const int64_t ours = peer.AddCache(6);
    const Status pulled = peer.Pull(2, theirs, ours, 0, 0, 4);
    EXPECT_EQ(pulled.code(), test.pull) << pulled.text();
    EXPECT_EQ(peer.Bytes(ours), pulled.ok() ? Copied(5, 6, 0, 0, 4) : test::PatternOf(Member::kShape, 6));
    const Status pushed = peer.Push(2, ours, theirs, 4, 4, 4);
    EXPECT_EQ(pushed.code(), test.push) << pushed.text();
    EXPECT_EQ(owner.Bytes(theirs), pushed.ok() ? Copied(6, 5, 4, 4, 4) : test::PatternOf(Member::kShape, 5));
    for (const Status &refused : {pulled, pushed}) {
      EXPECT_TRUE(refused.ok() || refused.text().find("datadist.PeerAccess") != std::string::npos) << refused.text();
    }
    EXPECT_TRUE(peer.Linked(2)) << "a refusal is no fault of the link";
  }
}

// Of several caches of one endpoint, for several linked clusters.
TEST_P(Rights, AreOfTheCacheAndTheCluster) {
  Member owner(2, Forced());
  Member peer(1, Forced());
  Member other(3, Forced());
  const SocketAddress address = owner.Listen();
  ASSERT_TRUE(peer.Dial(address, 2).ok());
  ASSERT_TRUE(other.Dial(address, 2).ok());
  const int64_t only_read = owner.AddCache(5, {PeerAccess::kRead, {}});
  const int64_t only_peers = owner.AddCache(6, {PeerAccess::kReadWrite, {1}});
  const int64_t nobodys = owner.AddCache(7, {PeerAccess::kNone, {}});
  struct Case {
    Member *who;
    int64_t cache;
    llm_datadist::Status pull;
    llm_datadist::Status push;
  };
  for (const Case &test : {Case{&peer, only_read, LLM_SUCCESS, LLM_PARAM_INVALID},
                           Case{&other, only_read, LLM_SUCCESS, LLM_PARAM_INVALID},
                           Case{&peer, only_peers, LLM_SUCCESS, LLM_SUCCESS},
                           Case{&other, only_peers, LLM_PARAM_INVALID, LLM_PARAM_INVALID},
                           Case{&peer, nobodys, LLM_PARAM_INVALID, LLM_PARAM_INVALID}}) {
    const int64_t ours = test.who->AddCache(9);
    const auto before = owner.Bytes(test.cache);
    EXPECT_EQ(test.who->Push(2, ours, test.cache, 4, 4, 4).code(), test.push);
    EXPECT_EQ(owner.Bytes(test.cache) == before, test.push != LLM_SUCCESS);
    EXPECT_EQ(test.who->Pull(2, test.cache, ours, 0, 0, 4).code(), test.pull);
    EXPECT_EQ(test.who->Bytes(ours) == test::PatternOf(Member::kShape, 9), test.pull != LLM_SUCCESS);
    EXPECT_TRUE(test.who->Linked(2)) << "a refusal is no fault of the link";
  }
}

INSTANTIATE_TEST_SUITE_P(Transports, Rights,
                         ::testing::Values("local", "cma", "tcp"),
                         [](const auto &kind) { return std::string(kind.param); });

}  // namespace
}  // namespace datadist::testing
