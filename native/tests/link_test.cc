// Links and transfers between two processes, and between two endpoints of one, over every transport.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <csignal>
#include <future>
#include <numeric>
#include <random>
#include <thread>

#include "support/node.h"
#include "support/peer_process.h"

namespace datadist::testing {
namespace {

using namespace llm_datadist;  // the codes, which every line here names
using ::testing::HasSubstr;

constexpr uint64_t kClient = 1;
constexpr uint64_t kServer = 2;
constexpr Shape kShape{4, 16, 4096};

Blocks RandomBlocks(std::mt19937 &random, size_t count, int64_t limit) {
  std::uniform_int_distribution<uint64_t> block(0, static_cast<uint64_t>(limit) - 1);
  Blocks blocks(count);
  for (uint64_t &value : blocks) {
    value = block(random);
  }
  return blocks;
}

class TwoProcesses : public ::testing::TestWithParam<const char *> {
 protected:
  void SetUp() override {
    ASSERT_EQ(client_.Start(ClientOptions({{OPTION_TRANSPORT, GetParam()}})), LLM_SUCCESS) << GetLastErrorText();
    ASSERT_EQ(server_.Start(kServer, ServerOptions({{OPTION_TRANSPORT, GetParam()}})), LLM_SUCCESS);
    mine_ = client_.AddCache(kShape, 7);
    theirs_ = server_.AddCache(kShape, 8);
    ASSERT_EQ(client_.Link(kServer, server_.port()), LLM_SUCCESS) << GetLastErrorText();
    ASSERT_EQ(client_.Report(kServer).transport, GetParam());
  }
  Node client_{kClient};
  PeerProcess server_;
  int64_t mine_ = 0;
  int64_t theirs_ = 0;
};

TEST_P(TwoProcesses, EitherEndPullsAndPushesRandomBlockLists) {
  constexpr uint32_t kSeed = 4711;
  std::mt19937 random(kSeed);
  Bytes mine = PatternContents(kShape, 7);
  Bytes theirs = PatternContents(kShape, 8);
  for (int round = 0; round < 40; ++round) {
    SCOPED_TRACE("seed " + std::to_string(kSeed) + " round " + std::to_string(round));
    const Blocks src = RandomBlocks(random, 1 + random() % 24, kShape.blocks);
    const Blocks dst = RandomBlocks(random, src.size(), kShape.blocks);
    switch (round % 4) {
      case 0:
        ASSERT_EQ(client_.Pull(kServer, theirs_, mine_, src, dst), LLM_SUCCESS) << GetLastErrorText();
        CopyBlocks(theirs, kShape, mine, kShape, src, dst);
        break;
      case 1:
        ASSERT_EQ(client_.Push(mine_, kServer, theirs_, src, dst), LLM_SUCCESS) << GetLastErrorText();
        CopyBlocks(mine, kShape, theirs, kShape, src, dst);
        break;
      case 2:
        ASSERT_EQ(server_.Pull(kClient, mine_, theirs_, src, dst), LLM_SUCCESS);
        CopyBlocks(mine, kShape, theirs, kShape, src, dst);
        break;
      default:
        ASSERT_EQ(server_.Push(theirs_, kClient, mine_, src, dst), LLM_SUCCESS);
        CopyBlocks(theirs, kShape, mine, kShape, src, dst);
        break;
    }
    ASSERT_EQ(client_.Contents(mine_), mine);
    ASSERT_EQ(server_.Contents(theirs_), theirs);
  }
}

TEST_P(TwoProcesses, ReportCountsBytes) {
  ASSERT_EQ(client_.Pull(kServer, theirs_, mine_, {0, 1}, {3, 4}), LLM_SUCCESS);
  ASSERT_EQ(client_.Push(mine_, kServer, theirs_, {0}, {3}), LLM_SUCCESS);
  const LinkReport report = client_.Report(kServer);
  EXPECT_TRUE(report.alive);
  EXPECT_EQ(report.bytes_pulled, 2U * kShape.tensors * static_cast<uint64_t>(kShape.stride));
  EXPECT_EQ(report.bytes_pushed, kShape.tensors * static_cast<uint64_t>(kShape.stride));
}

TEST_P(TwoProcesses, CacheThatThePeerUnregisteredIsGone) {
  ASSERT_EQ(client_.Pull(kServer, theirs_, mine_, {0}, {0}), LLM_SUCCESS);
  ASSERT_EQ(server_.Unregister(theirs_), LLM_SUCCESS);
  EXPECT_EQ(client_.Pull(kServer, theirs_, mine_, {0}, {0}), LLM_KV_CACHE_NOT_EXIST);
  EXPECT_EQ(client_.Push(mine_, kServer, theirs_, {0}, {0}), LLM_KV_CACHE_NOT_EXIST);
  EXPECT_TRUE(client_.Alive(kServer));
}

TEST_P(TwoProcesses, KilledPeerEndsCallsAndARestartedOneCanBeLinked) {
  const Blocks all = [] {
    Blocks blocks(static_cast<size_t>(kShape.blocks));
    std::iota(blocks.begin(), blocks.end(), 0);
    return blocks;
  }();
  ASSERT_EQ(client_.Pull(kServer, theirs_, mine_, all, all), LLM_SUCCESS);
  const uint16_t port = server_.port();
  server_.Signal(SIGKILL);
  EXPECT_EQ(client_.Pull(kServer, theirs_, mine_, all, all), LLM_FAILED);
  EXPECT_EQ(client_.Pull(kServer, theirs_, mine_, all, all), LLM_FAILED);
  EXPECT_THAT(GetLastErrorText(), HasSubstr("unlink or relink"));
  EXPECT_FALSE(client_.Alive(kServer));

  PeerProcess restarted;
  const std::string address = std::string(kLoopback) + ":" + std::to_string(port);
  ASSERT_EQ(restarted.Start(kServer, ClientOptions({{OPTION_LISTEN_IP_INFO, address}})), LLM_SUCCESS);
  ASSERT_EQ(restarted.AddCache(kShape, 99), 1);
  ASSERT_EQ(client_.Link(kServer, port), LLM_SUCCESS) << GetLastErrorText();
  ASSERT_EQ(client_.Pull(kServer, 1, mine_, all, all), LLM_SUCCESS) << GetLastErrorText();
  EXPECT_EQ(client_.Contents(mine_), PatternContents(kShape, 99));
}

TEST_P(TwoProcesses, UnlinkDropsBothHalves) {
  ASSERT_EQ(client_.Unlink(kServer, server_.port()), LLM_SUCCESS) << GetLastErrorText();
  EXPECT_EQ(client_.Pull(kServer, theirs_, mine_, {0}, {0}), LLM_NOT_YET_LINK);
  EXPECT_EQ(server_.Pull(kClient, mine_, theirs_, {0}, {0}), LLM_NOT_YET_LINK);
  EXPECT_EQ(client_.Unlink(kServer, server_.port()), LLM_SUCCESS) << "an unknown link is a success";
  ASSERT_EQ(client_.Link(kServer, server_.port()), LLM_SUCCESS);
  EXPECT_EQ(client_.Pull(kServer, theirs_, mine_, {0}, {0}), LLM_SUCCESS);
}

TEST_P(TwoProcesses, StoppedPeerEndsTheCallAtItsDeadline) {
  const uint16_t port = server_.port();
  Node hasty(10);
  ASSERT_EQ(hasty.Start(ClientOptions({{OPTION_TRANSPORT, GetParam()}, {OPTION_SYNC_CACHE_WAIT_TIME, "500"}})),
            LLM_SUCCESS);
  const int64_t into = hasty.AddCache(kShape, 7);
  ASSERT_EQ(hasty.Link(kServer, port), LLM_SUCCESS) << GetLastErrorText();
  server_.Signal(SIGSTOP);
  // A cache not described yet: the call needs an answer of the stopped process, whatever the transport.
  EXPECT_EQ(hasty.Pull(kServer, theirs_, into, {0}, {0}), LLM_TIMEOUT);
  EXPECT_EQ(hasty.Pull(kServer, theirs_, into, {0}, {0}), LLM_FAILED) << "a timeout leaves the link lost";
  EXPECT_EQ(hasty.Unlink(kServer, port, 300), LLM_UNLINK_FAILED);
  Node other(9);
  ASSERT_EQ(other.Start(ClientOptions()), LLM_SUCCESS);
  EXPECT_EQ(other.Link(kServer, port, 300), LLM_LINK_FAILED) << GetLastErrorText();
  EXPECT_EQ(hasty.Unlink(kServer, port, 300, true), LLM_SUCCESS);
  EXPECT_EQ(client_.Unlink(kServer, port, 300, true), LLM_SUCCESS);
  server_.Signal(SIGCONT);
  ASSERT_EQ(client_.Link(kServer, server_.port()), LLM_SUCCESS) << GetLastErrorText();
  EXPECT_EQ(client_.Pull(kServer, theirs_, mine_, {0}, {0}), LLM_SUCCESS) << GetLastErrorText();
}

INSTANTIATE_TEST_SUITE_P(Transports, TwoProcesses, ::testing::Values("cma", "tcp"),
                         [](const auto &name) { return std::string(name.param); });

class OneProcess : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(client_.Start(ClientOptions()), LLM_SUCCESS) << GetLastErrorText();
    ASSERT_EQ(server_.Start(ServerOptions()), LLM_SUCCESS) << GetLastErrorText();
    mine_ = client_.AddCache(kShape, 7);
    theirs_ = server_.AddCache(kShape, 8);
  }
  Node client_{kClient};
  Node server_{kServer};
  int64_t mine_ = 0;
  int64_t theirs_ = 0;
};

TEST_F(OneProcess, MovesBytesByPlainCopies) {
  ASSERT_EQ(client_.Link(kServer, server_.port()), LLM_SUCCESS) << GetLastErrorText();
  EXPECT_EQ(client_.Report(kServer).transport, "local");
  Bytes expected = PatternContents(kShape, 7);
  CopyBlocks(PatternContents(kShape, 8), kShape, expected, kShape, {5, 0, 5}, {0, 1, 2});
  ASSERT_EQ(client_.Pull(kServer, theirs_, mine_, {5, 0, 5}, {0, 1, 2}), LLM_SUCCESS) << GetLastErrorText();
  EXPECT_EQ(client_.Contents(mine_), expected);
  ASSERT_EQ(server_.Pull(kClient, mine_, theirs_, {0}, {0}), LLM_SUCCESS) << GetLastErrorText();
}

TEST_F(OneProcess, TwoRegistrationsOfOneMemoryEndEachForItself) {
  Bytes memory = PatternContents(Shape{1, 16, 4096}, 9);
  CacheDesc desc{};
  desc.num_tensors = 1;
  desc.data_type = DT_UINT8;
  desc.shape = {16, 4096};
  const std::vector<uint64_t> addrs = {reinterpret_cast<uint64_t>(memory.data())};
  int64_t first = 0;
  int64_t second = 0;
  ASSERT_EQ(server_.datadist().RegisterKvCache(desc, addrs, {}, first), LLM_SUCCESS);
  ASSERT_EQ(server_.datadist().RegisterKvCache(desc, addrs, {}, second), LLM_SUCCESS);
  const int64_t mine = client_.AddCache(Shape{1, 16, 4096}, 7);
  ASSERT_EQ(client_.Link(kServer, server_.port()), LLM_SUCCESS) << GetLastErrorText();
  ASSERT_EQ(server_.datadist().UnregisterKvCache(first), LLM_SUCCESS);
  EXPECT_EQ(client_.Pull(kServer, first, mine, {0}, {0}), LLM_KV_CACHE_NOT_EXIST);
  ASSERT_EQ(client_.Pull(kServer, second, mine, {1}, {0}), LLM_SUCCESS) << GetLastErrorText();
  const Bytes pulled = client_.Contents(mine);
  EXPECT_TRUE(std::equal(pulled.begin(), pulled.begin() + 4096, memory.begin() + 4096));
  ASSERT_EQ(server_.datadist().UnregisterKvCache(second), LLM_SUCCESS);  // before the memory goes
}

TEST_F(OneProcess, LiveLinkUnderThePeersIdIsAlreadyLinked) {
  ASSERT_EQ(client_.Link(kServer, server_.port()), LLM_SUCCESS);
  EXPECT_EQ(client_.Link(kServer, server_.port()), LLM_ALREADY_LINK);
  EXPECT_THAT(GetLastErrorText(), HasSubstr("linked already"));
  EXPECT_EQ(client_.Link(0, server_.port()), LLM_SUCCESS) << "id 0 relinks";
  EXPECT_EQ(client_.Pull(kServer, theirs_, mine_, {0}, {0}), LLM_SUCCESS) << GetLastErrorText();
  EXPECT_EQ(server_.Pull(kClient, mine_, theirs_, {0}, {0}), LLM_SUCCESS) << GetLastErrorText();
}

TEST_F(OneProcess, LinkToWhoeverAnswersIsKeptUnderTheAnnouncedIdAndFoundByTheCallersOwn) {
  ASSERT_EQ(client_.Link(0, server_.port()), LLM_SUCCESS);
  EXPECT_TRUE(client_.Alive(kServer));
  EXPECT_EQ(client_.Pull(0, theirs_, mine_, {0}, {0}), LLM_NOT_YET_LINK);
  EXPECT_EQ(client_.Unlink(0, server_.port()), LLM_SUCCESS);
  EXPECT_FALSE(client_.Alive(kServer));
  EXPECT_FALSE(server_.Alive(kClient));
}

TEST_F(OneProcess, OwnClusterIdIsRefused) {
  Node twin(kServer);
  ASSERT_EQ(twin.Start(ClientOptions()), LLM_SUCCESS);
  EXPECT_EQ(twin.Link(0, server_.port()), LLM_PARAM_INVALID);
  EXPECT_THAT(GetLastErrorText(), HasSubstr("2"));
}

TEST_F(OneProcess, FinalizeLeavesThePeerWithALostLinkThatUnlinkClears) {
  ASSERT_EQ(client_.Link(kServer, server_.port()), LLM_SUCCESS);
  const uint16_t port = server_.port();
  server_.datadist().Finalize();
  EXPECT_EQ(client_.Pull(kServer, theirs_, mine_, {0}, {0}), LLM_FAILED);
  EXPECT_EQ(client_.Unlink(kServer, port), LLM_UNLINK_FAILED) << "nobody listens; the link is kept";
  EXPECT_EQ(client_.Pull(kServer, theirs_, mine_, {0}, {0}), LLM_FAILED);
  EXPECT_EQ(client_.Unlink(kServer, port, 1000, true), LLM_SUCCESS);
  EXPECT_EQ(client_.Pull(kServer, theirs_, mine_, {0}, {0}), LLM_NOT_YET_LINK);
}

TEST_F(OneProcess, LostLinkIsUnlinkedOverAFreshConnection) {
  ASSERT_EQ(client_.Link(kServer, server_.port()), LLM_SUCCESS);
  // The server comes back at the same address, and knows nothing of the link.
  const uint16_t port = server_.port();
  server_.datadist().Finalize();
  const std::string address = std::string(kLoopback) + ":" + std::to_string(port);
  ASSERT_EQ(server_.Start(ClientOptions({{OPTION_LISTEN_IP_INFO, address}})), LLM_SUCCESS) << GetLastErrorText();
  EXPECT_EQ(client_.Pull(kServer, theirs_, mine_, {0}, {0}), LLM_FAILED);
  EXPECT_EQ(client_.Unlink(kServer, port), LLM_SUCCESS) << GetLastErrorText();
  EXPECT_EQ(client_.Pull(kServer, theirs_, mine_, {0}, {0}), LLM_NOT_YET_LINK);
}

TEST_F(OneProcess, ForcedTransportThatCannotReachFailsTheLink) {
  PeerProcess other;
  ASSERT_EQ(other.Start(5, ServerOptions()), LLM_SUCCESS);
  Node local(9);
  ASSERT_EQ(local.Start(ClientOptions({{OPTION_TRANSPORT, "local"}})), LLM_SUCCESS);
  EXPECT_EQ(local.Link(5, other.port()), LLM_LINK_FAILED);
  EXPECT_THAT(GetLastErrorText(), HasSubstr("another process"));
}

TEST_F(OneProcess, MixedTransportsOfOneLink) {
  Node tcp(9);
  ASSERT_EQ(tcp.Start(ClientOptions({{OPTION_TRANSPORT, "tcp"}, {OPTION_TCP_STREAMS, "3"}})), LLM_SUCCESS);
  const int64_t cache = tcp.AddCache(kShape, 3);
  ASSERT_EQ(tcp.Link(kServer, server_.port()), LLM_SUCCESS) << GetLastErrorText();
  EXPECT_EQ(tcp.Report(kServer).transport, "tcp");
  EXPECT_EQ(server_.Report(9).transport, "local");
  EXPECT_EQ(tcp.Pull(kServer, theirs_, cache, {1}, {2}), LLM_SUCCESS) << GetLastErrorText();
  EXPECT_EQ(server_.Push(theirs_, 9, cache, {1}, {2}), LLM_SUCCESS) << GetLastErrorText();
}

// Both ends dial at once, again and again. Whoever is linked keeps that link: the other's dial must not replace it.
TEST(CrossingDials, LeaveOneLinkThatIsNeverReplaced) {
  constexpr int kRounds = 200;
  std::array<Node, 2> nodes = {Node(1), Node(2)};
  std::array<int64_t, 2> caches{};
  for (size_t i = 0; i < nodes.size(); ++i) {
    ASSERT_EQ(nodes[i].Start(ServerOptions()), LLM_SUCCESS) << GetLastErrorText();
    caches[i] = nodes[i].AddCache(Shape{1, 4, 64}, 7);
  }
  for (int round = 0; round < kRounds; ++round) {
    std::atomic<int> starting{2};
    std::atomic<int> dialling{2};
    const auto dial_and_pull = [&](size_t i) -> std::string {
      Node &here = nodes[i];
      Node &there = nodes[1 - i];
      for (--starting; starting > 0;) {
      }
      Status status = LLM_PROCESSING_LINK;
      while (status == LLM_PROCESSING_LINK) {
        status = here.Link(there.id(), there.port());
      }
      const std::string error = status == LLM_SUCCESS || status == LLM_ALREADY_LINK ? "" : GetLastErrorText();
      --dialling;
      bool pulled = error.empty();
      do {
        pulled = pulled && here.Pull(there.id(), caches[1 - i], caches[i], {1}, {2}) == LLM_SUCCESS;
      } while (dialling > 0);
      return pulled ? "" : error + " / " + GetLastErrorText();
    };
    auto other = std::async(std::launch::async, dial_and_pull, size_t{1});
    ASSERT_EQ(dial_and_pull(0), "") << "round " << round;
    ASSERT_EQ(other.get(), "") << "round " << round;
    ASSERT_EQ(nodes[0].Unlink(2, nodes[1].port()), LLM_SUCCESS) << GetLastErrorText();
    while (nodes[1].Alive(1)) {
      std::this_thread::yield();
    }
  }
}

TEST_F(OneProcess, NobodyListensIsLinkFailed) {
  const uint16_t port = server_.port();
  server_.datadist().Finalize();
  EXPECT_EQ(client_.Link(kServer, port), LLM_LINK_FAILED);
}

}  // namespace
}  // namespace datadist::testing

int main(int argc, char **argv) {
  datadist::testing::RunIfPeer(argc, argv);
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
