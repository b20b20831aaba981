// What peers may do with an endpoint's caches, on every transport: read, write, neither.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "support/member.h"
#include "support/node.h"

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

TEST(RightsOfTheApi, AreToldAtRegistration) {
  constexpr uint64_t kOwner = 2;
  constexpr uint64_t kReader = 1;
  std::vector<uint8_t> bytes(4096, 7);
  Node owner(kOwner);
  Node reader(kReader);
  ASSERT_EQ(owner.Start(ServerOptions()), LLM_SUCCESS) << llm_datadist::GetLastErrorText();
  ASSERT_EQ(reader.Start(ClientOptions()), LLM_SUCCESS) << llm_datadist::GetLastErrorText();
  llm_datadist::CacheDesc desc{};
  desc.num_tensors = 1;
  desc.data_type = llm_datadist::DT_INT32;
  desc.shape = {16, 64};
  int64_t for_reading = 0;
  int64_t for_others = 0;
  const std::vector<uint64_t> addrs{reinterpret_cast<uint64_t>(bytes.data())};
  ASSERT_EQ(RegisterKvCache(owner.datadist(), desc, addrs, {PeerAccess::kRead, {}}, for_reading), LLM_SUCCESS);
  ASSERT_EQ(RegisterKvCache(owner.datadist(), desc, addrs, {PeerAccess::kRead, {9}}, for_others), LLM_SUCCESS);
  const int64_t ours = reader.AddCache({1, 16, 256}, 3);
  ASSERT_EQ(reader.Link(kOwner, owner.port()), LLM_SUCCESS) << llm_datadist::GetLastErrorText();
  EXPECT_EQ(reader.Push(ours, kOwner, for_reading, {0}, {0}), LLM_PARAM_INVALID);
  EXPECT_EQ(reader.Pull(kOwner, for_others, ours, {0}, {0}), LLM_PARAM_INVALID);
  EXPECT_THAT(llm_datadist::GetLastErrorText(), ::testing::HasSubstr("is not for cluster 1"));
  EXPECT_EQ(reader.Pull(kOwner, for_reading, ours, {0}, {0}), LLM_SUCCESS) << llm_datadist::GetLastErrorText();
  EXPECT_EQ(reader.Contents(ours)[255], 7);
}

}  // namespace
}  // namespace datadist::testing
