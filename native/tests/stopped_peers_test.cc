// Peers whose processes have stopped, as a debugger or an overloaded host stops them: they cost those that go on nothing.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>

#include <chrono>
#include <csignal>
#include <memory>
#include <vector>

#include "provider/engine.h"
#include "provider/transfer_queue.h"
#include "support/peer_process.h"

namespace datadist::testing {
namespace {

using std::chrono::milliseconds;

constexpr Shape kShape{4, 16, 4096};
constexpr uint64_t kStopped = 4;
constexpr uint64_t kHealthy = kStopped + 1;
constexpr milliseconds kLong = std::chrono::minutes(2);

class StoppedPeers : public ::testing::TestWithParam<const char *> {
 protected:
  void SetUp() override {
    const TextOptions options = {{llm_datadist::OPTION_TRANSPORT, GetParam()},
                                 {llm_datadist::OPTION_SYNC_CACHE_WAIT_TIME, "60000"},
                                 {llm_datadist::OPTION_HEARTBEAT_MS, "60000"}};
    ASSERT_TRUE(provider_->Initialize(ClientOptions(options)).ok());
    memory_.assign(kShape.tensors, Bytes(static_cast<size_t>(kShape.blocks * kShape.stride)));
    llm_datadist::CacheDesc desc{};
    desc.num_tensors = kShape.tensors;
    desc.data_type = llm_datadist::DT_UINT8;
    desc.shape = {kShape.blocks, kShape.stride};
    std::vector<uint64_t> addrs;
    for (Bytes &tensor : memory_) {
      addrs.push_back(reinterpret_cast<uintptr_t>(tensor.data()));
    }
    const Result<int64_t> local = provider_->RegisterKvCache(desc, addrs);
    ASSERT_TRUE(local.ok()) << local.status().text();
    local_ = local.value();
    for (uint64_t id = 1; id <= kHealthy; ++id) {
      PeerProcess &peer = peers_[id - 1];
      ASSERT_EQ(peer.Start(id, ServerOptions(options)), llm_datadist::LLM_SUCCESS);
      remote_.push_back(peer.AddCache(kShape, static_cast<uint32_t>(id)));
      std::vector<llm_datadist::Status> rets;
      const Status linked = provider_->Link({Cluster(id, peer.port())}, rets, kPatienceMs);
      ASSERT_TRUE(linked.ok()) << linked.text();
    }
    queue_ = std::move(TransferQueue::Create(provider_, 4, 256).value());
  }
  void TearDown() override {
    for (PeerProcess &peer : peers_) {  // what waits for them fails
      peer.Signal(SIGKILL);
    }
  }

  uint64_t SubmitPull(uint64_t id, milliseconds deadline = kLong) {
    PullBlocksOp op;
    op.transfer.remote.cluster_id = id;
    op.transfer.remote.cache_id = remote_[id - 1];
    op.transfer.local.cache_id = local_;
    for (uint64_t block = 0; block < static_cast<uint64_t>(kShape.blocks); ++block) {
      op.transfer.src_blocks.push_back(block);
      op.transfer.dst_blocks.push_back(block);
    }
    return queue_->Submit(std::move(op), deadline).id;
  }

  uint64_t SubmitPush(uint64_t id, milliseconds deadline) {
    PushBlocksOp op;
    op.transfer.remote.cluster_id = id;
    op.transfer.remote.cache_id = remote_[id - 1];
    op.transfer.local.cache_id = local_;
    op.transfer.local.cache_desc.placement = llm_datadist::CachePlacement::kDevice;
    op.transfer.src_blocks = op.transfer.dst_blocks = {0};
    return queue_->Submit(std::move(op), deadline).id;
  }
  void ExpectTimeout(uint64_t id) {
    const std::vector<Completion> completions = NextCompletions();
    ASSERT_EQ(completions.size(), 1U);
    EXPECT_EQ(completions[0].id, id);
    EXPECT_EQ(completions[0].status, llm_datadist::LLM_TIMEOUT) << completions[0].error;
    EXPECT_FALSE(completions[0].cancelled);
    EXPECT_LT(completions[0].run, std::chrono::seconds(30));
  }

  std::vector<Completion> NextCompletions() {
    pollfd fd{queue_->event_fd(), POLLIN, 0};
    (void)::poll(&fd, 1, static_cast<int>(kLong.count()));
    return queue_->Poll();
  }

  std::vector<Bytes> memory_;  // dies last: the engine below still uses it
  PeerProcess peers_[kHealthy];
  std::vector<int64_t> remote_;
  std::shared_ptr<Provider> provider_ = MakeEngineProvider(100, llm_datadist::LlmRole::kMix, EngineApi::kCpp);
  int64_t local_ = 0;
  std::unique_ptr<TransferQueue> queue_;
};

// Every pull of the healthy peer ends before any of those that the stopped ones hold, though these were first.
TEST_P(StoppedPeers, DelayNobodyElse) {
  for (uint64_t id = 1; id <= kStopped; ++id) {
    peers_[id - 1].Signal(SIGSTOP);
  }
  for (uint64_t id = 1; id <= kStopped; ++id) {
    SubmitPull(id);
  }
  const Bytes expected = PatternContents(kShape, kHealthy);
  for (int round = 0; round < 20; ++round) {
    for (Bytes &tensor : memory_) {
      tensor.assign(tensor.size(), 0);
    }
    const uint64_t healthy = SubmitPull(kHealthy);
    const std::vector<Completion> completions = NextCompletions();
    ASSERT_EQ(completions.size(), 1U);
    ASSERT_EQ(completions[0].id, healthy) << completions[0].error;
    ASSERT_EQ(completions[0].status, llm_datadist::LLM_SUCCESS) << completions[0].error;
    Bytes got;
    for (const Bytes &tensor : memory_) {
      got.insert(got.end(), tensor.begin(), tensor.end());
    }
    ASSERT_EQ(got, expected) << round;
  }
}

// Their options would let them wait for a minute.
TEST_P(StoppedPeers, HoldATransferNoLongerThanItsDeadline) {
  constexpr milliseconds kSoon{2000};  // by then it runs, however busy the machine is
  for (uint64_t peer = 1; peer <= 2; ++peer) {
    peers_[peer - 1].Signal(SIGSTOP);
    ExpectTimeout(peer == 1 ? SubmitPull(peer, kSoon) : SubmitPush(peer, kSoon));
  }
}

INSTANTIATE_TEST_SUITE_P(Transports, StoppedPeers, ::testing::Values("cma", "tcp"),
                         [](const auto &name) { return std::string(name.param); });

}  // namespace
}  // namespace datadist::testing

int main(int argc, char **argv) {
  datadist::testing::RunIfPeer(argc, argv);
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
