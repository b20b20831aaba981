// The contract of provider.h, for every provider: our engine, and CANN's library as the stand-in is it, in its strict
// mode.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "provider/transfer_queue.h"
#include "support/eventually.h"
#include "support/provider_node.h"
#include "support/standin.h"

namespace datadist::testing {
namespace {

using namespace llm_datadist;  // the codes, which every line here names
using datadist::Status;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::StartsWith;

constexpr uint64_t kA = 1;
constexpr uint64_t kB = 2;
constexpr uint64_t kStranger = 9;
constexpr int64_t kNoCache = 1234;
constexpr Shape kShape{10, 16, 64};

// A library that is loaded stays loaded: before any test asks for the providers.
const bool kStandInUsed = [] {
  ::setenv("CANN_STANDIN_STRICT", "1", 1);
  UseStandIn();
  return true;
}();

class ProviderContract : public ::testing::TestWithParam<const char *> {
 protected:
  void SetUp() override {
    ASSERT_TRUE(kStandInUsed);
    const Status served = b_.provider().Initialize(ServerOptions({{OPTION_SYNC_CACHE_WAIT_TIME, "5000"}}));
    ASSERT_TRUE(served.ok()) << served.text();
    const Status started = a_.provider().Initialize(ClientOptions({{OPTION_SYNC_CACHE_WAIT_TIME, "5000"}}));
    ASSERT_TRUE(started.ok()) << started.text();
    mine_ = a_.AddCache(kShape, 1);
    theirs_ = b_.AddCache(kShape, 2);
  }
  void Link() {
    const Status status = a_.Link(b_);
    ASSERT_TRUE(status.ok()) << status.text();
  }
  CacheTransfer Row(uint32_t remote_row, uint32_t local_row, int64_t size = -1) const {
    CacheTransfer transfer;
    transfer.remote = {kB, theirs_, remote_row, {}};
    transfer.local.cache_id = mine_;
    transfer.local_batch_index = local_row;
    transfer.size = size;
    return transfer;
  }

  ProviderNode a_{GetParam(), kA};
  ProviderNode b_{GetParam(), kB};
  int64_t mine_ = 0;
  int64_t theirs_ = 0;
};

TEST_P(ProviderContract, BeforeInitializeEveryCallFailsAndFinalizeDoesNothing) {
  ProviderNode node(GetParam(), kStranger);
  Provider &provider = node.provider();
  std::vector<llm_datadist::Status> rets = {77};
  provider.Finalize();
  EXPECT_EQ(provider.SetRole(LlmRole::kMix, {}).code(), LLM_FAILED);
  EXPECT_EQ(provider.Link({Cluster(kB, b_.port())}, rets, 1000).code(), LLM_FAILED);
  EXPECT_EQ(provider.Unlink({Cluster(kB, b_.port())}, rets, 1000, true).code(), LLM_FAILED);
  EXPECT_EQ(provider.RegisterKvCache({}, {}).status().code(), LLM_FAILED);
  EXPECT_EQ(provider.UnregisterKvCache(1).code(), LLM_FAILED);
  EXPECT_EQ(provider.PullKvBlocks({}).code(), LLM_FAILED);
  EXPECT_EQ(provider.PushKvBlocks({}).code(), LLM_FAILED);
  EXPECT_EQ(provider.PullKvCache({}).code(), LLM_FAILED);
  EXPECT_EQ(provider.PushKvCache({}).code(), LLM_FAILED);
  EXPECT_EQ(provider.ListenPort().status().code(), LLM_FAILED);
  EXPECT_THAT(provider.PullKvBlocks({}).text(), AllOf(StartsWith("PullKvBlocks: "), HasSubstr("not initialized")));
}

TEST_P(ProviderContract, InitializeAndFinalizeAreIdempotentAndIdsStartAgain) {
  EXPECT_EQ(mine_, 1);
  EXPECT_TRUE(a_.provider().Initialize({}).ok()) << "options of a second call are not looked at";
  a_.provider().Finalize();
  a_.provider().Finalize();
  EXPECT_EQ(a_.Pull(kB, theirs_, mine_, {0}, {0}).code(), LLM_FAILED);
  EXPECT_TRUE(a_.provider().Initialize(ClientOptions()).ok());
  EXPECT_EQ(a_.AddCache(kShape, 1), 1);
}

TEST_P(ProviderContract, AFailedInitializeCanBeTriedAgain) {
  ProviderNode node(GetParam(), kStranger);
  EXPECT_EQ(node.provider().Initialize(ClientOptions({{OPTION_DEVICE_ID, "x"}})).code(), LLM_PARAM_INVALID);
  EXPECT_EQ(node.provider().Initialize(ClientOptions({{OPTION_LISTEN_IP_INFO, "nowhere"}})).code(), LLM_PARAM_INVALID);
  const Status taken = node.provider().Initialize(
      ClientOptions({{OPTION_LISTEN_IP_INFO, kLoopback + (":" + std::to_string(b_.port()))}}));
  EXPECT_EQ(taken.code(), LLM_FAILED);
  EXPECT_THAT(taken.text(), HasSubstr(std::to_string(b_.port()))) << "whose port is taken says which";
  EXPECT_TRUE(node.provider().Initialize(ClientOptions()).ok());
}

TEST_P(ProviderContract, TellsThePortThatWasChosen) {
  EXPECT_TRUE(b_.provider().capabilities().reports_port);
  EXPECT_NE(b_.port(), 0);
  EXPECT_EQ(a_.provider().ListenPort().status().code(), LLM_FEATURE_NOT_ENABLED) << "it does not listen";
  ASSERT_TRUE(a_.provider().SetRole(LlmRole::kMix, ServerOptions()).ok());
  EXPECT_NE(a_.port(), 0);
  ASSERT_TRUE(b_.Link(a_).ok()) << "and listens there";
  EXPECT_EQ(b_.provider().SetRole(LlmRole::kPrompt, {}).code(), LLM_EXIST_LINK);
}

// Lists with runs and jumps, some blocks several times.
TEST_P(ProviderContract, PullsAndPushesBlocksByteForByte) {
  Link();
  std::mt19937_64 random(7);
  for (int round = 0; round < 20; ++round) {
    Blocks src(1 + random() % 12);
    std::generate(src.begin(), src.end(), [&] { return random() % static_cast<uint64_t>(kShape.blocks); });
    Blocks dst(static_cast<size_t>(kShape.blocks));
    std::iota(dst.begin(), dst.end(), 0);
    std::shuffle(dst.begin(), dst.end(), random);
    dst.resize(src.size());
    const bool pull = round % 2 == 0;
    Bytes expected = pull ? a_.Contents(mine_) : b_.Contents(theirs_);
    CopyBlocks(pull ? b_.Contents(theirs_) : a_.Contents(mine_), kShape, expected, kShape, src, dst);
    const Status status = pull ? a_.Pull(kB, theirs_, mine_, src, dst) : a_.Push(mine_, kB, theirs_, src, dst);
    ASSERT_TRUE(status.ok()) << status.text();
    ASSERT_EQ(pull ? a_.Contents(mine_) : b_.Contents(theirs_), expected) << "round " << round;
  }
}

TEST_P(ProviderContract, EitherSideTransfersOverALink) {
  Link();
  Bytes expected = b_.Contents(theirs_);
  CopyBlocks(a_.Contents(mine_), kShape, expected, kShape, {3, 4}, {9, 1});
  ASSERT_TRUE(b_.Pull(kA, mine_, theirs_, {3, 4}, {9, 1}).ok());
  EXPECT_EQ(b_.Contents(theirs_), expected);
}

TEST_P(ProviderContract, PullsAndPushesRowsByteForByte) {
  Link();
  Bytes expected = a_.Contents(mine_);
  CopyBlocks(b_.Contents(theirs_), kShape, expected, kShape, {5}, {2});
  ASSERT_TRUE(a_.provider().PullKvCache(Row(5, 2)).ok());
  EXPECT_EQ(a_.Contents(mine_), expected);
  ASSERT_TRUE(a_.provider().PullKvCache(Row(7, 3, 16)).ok()) << "part of a row";
  const Bytes theirs = b_.Contents(theirs_);
  std::copy_n(theirs.begin() + 7 * kShape.stride, 16, expected.begin() + 3 * kShape.stride);
  const Bytes got = a_.Contents(mine_);
  EXPECT_TRUE(std::equal(got.begin(), got.begin() + kShape.blocks * kShape.stride, expected.begin()));

  Bytes pushed = b_.Contents(theirs_);
  CopyBlocks(a_.Contents(mine_), kShape, pushed, kShape, {4}, {6});
  ASSERT_TRUE(a_.provider().PushKvCache(Row(6, 4)).ok());
  EXPECT_EQ(b_.Contents(theirs_), pushed);
}

TEST_P(ProviderContract, TransfersTheLayersThatAreChosen) {
  Link();
  constexpr std::ptrdiff_t tensor_bytes = kShape.blocks * kShape.stride;
  Bytes expected = a_.Contents(mine_);
  const Bytes theirs = b_.Contents(theirs_);
  for (const std::ptrdiff_t tensor : {0, 1, 2, 3}) {  // layers 1 and 2 there to 0 and 1 here, block 3 to 8
    const auto from = theirs.begin() + (tensor + 2) * tensor_bytes + 3 * kShape.stride;
    std::copy_n(from, kShape.stride, expected.begin() + tensor * tensor_bytes + 8 * kShape.stride);
  }
  BlocksTransfer transfer = a_.Blocks(kB, theirs_, mine_, {3}, {8});
  transfer.ext.src_layer_range = {1, 2};
  transfer.ext.dst_layer_range = {0, 1};
  ASSERT_TRUE(a_.provider().PullKvBlocks(transfer).ok());
  EXPECT_EQ(a_.Contents(mine_), expected);

  transfer.ext.dst_layer_range = {-1, -1};
  const Status one_sided = a_.provider().PullKvBlocks(transfer);
  EXPECT_EQ(one_sided.code(), LLM_PARAM_INVALID);
  EXPECT_THAT(one_sided.text(), HasSubstr("layer_range"));
  EXPECT_EQ(a_.provider().PushKvBlocks(transfer).code(), LLM_PARAM_INVALID);
  transfer.ext.src_layer_range = {4, 5};  // of five layers
  transfer.ext.dst_layer_range = {4, 5};
  EXPECT_EQ(a_.provider().PullKvBlocks(transfer).code(), LLM_PARAM_INVALID);
  EXPECT_EQ(a_.Contents(mine_), expected) << "what is refused moves nothing";
}

// 10 tensors in layers of 3: the number selects nothing where every layer is meant.
TEST_P(ProviderContract, PushesEveryTensorWhateverTheLayers) {
  Link();
  for (const uint64_t per_layer : {1, 2, 3, 15}) {
    BlocksTransfer transfer = a_.Blocks(kB, theirs_, mine_, {per_layer}, {0});
    transfer.ext.tensor_num_per_layer = static_cast<uint8_t>(per_layer);
    Bytes expected = b_.Contents(theirs_);
    CopyBlocks(a_.Contents(mine_), kShape, expected, kShape, {per_layer}, {0});
    const Status status = a_.provider().PushKvBlocks(transfer);
    ASSERT_TRUE(status.ok()) << status.text();
    EXPECT_EQ(b_.Contents(theirs_), expected) << per_layer;
  }
}

TEST_P(ProviderContract, RefusesWhatIsWrongByItsCode) {
  EXPECT_EQ(a_.Pull(kB, theirs_, mine_, {0}, {0}).code(), LLM_NOT_YET_LINK);
  EXPECT_EQ(a_.Push(mine_, kB, theirs_, {0}, {0}).code(), LLM_NOT_YET_LINK);
  Link();
  const Bytes before = a_.Contents(mine_);
  const Bytes theirs_before = b_.Contents(theirs_);
  EXPECT_EQ(a_.Pull(kB, theirs_, kNoCache, {0}, {0}).code(), LLM_KV_CACHE_NOT_EXIST);
  EXPECT_EQ(a_.Pull(kB, kNoCache, mine_, {0}, {0}).code(), LLM_KV_CACHE_NOT_EXIST);
  EXPECT_EQ(a_.Push(kNoCache, kB, theirs_, {0}, {0}).code(), LLM_KV_CACHE_NOT_EXIST);
  EXPECT_EQ(a_.Push(mine_, kB, kNoCache, {0}, {0}).code(), LLM_KV_CACHE_NOT_EXIST);
  EXPECT_EQ(a_.Pull(kStranger, theirs_, mine_, {0}, {0}).code(), LLM_NOT_YET_LINK);
  EXPECT_EQ(a_.Pull(kA, mine_, mine_, {0}, {1}).code(), LLM_PARAM_INVALID) << "from oneself";
  EXPECT_EQ(a_.Pull(kB, theirs_, mine_, {}, {}).code(), LLM_PARAM_INVALID);
  EXPECT_EQ(a_.Pull(kB, theirs_, mine_, {0, 1}, {0}).code(), LLM_PARAM_INVALID);
  EXPECT_EQ(a_.Pull(kB, theirs_, mine_, {0}, {16}).code(), LLM_PARAM_INVALID);
  EXPECT_EQ(a_.Push(mine_, kB, theirs_, {16}, {0}).code(), LLM_PARAM_INVALID);
  EXPECT_EQ(a_.Push(mine_, kB, theirs_, {0}, {16}).code(), LLM_PARAM_INVALID);
  EXPECT_EQ(a_.provider().PullKvCache(Row(0, 16)).code(), LLM_PARAM_INVALID);
  EXPECT_EQ(a_.provider().PullKvCache(Row(0, 0, 65)).code(), LLM_PARAM_INVALID);
  EXPECT_EQ(a_.provider().PushKvCache(Row(0, 0, 16)).code(), LLM_PARAM_INVALID);
  EXPECT_EQ(a_.Contents(mine_), before);
  EXPECT_EQ(b_.Contents(theirs_), theirs_before);
}

TEST_P(ProviderContract, EveryClusterHasItsStatus) {
  std::vector<llm_datadist::Status> rets = {77, 78, 79};
  Provider &provider = a_.provider();
  const Status mixed = provider.Link({Cluster(kB, b_.port()), Cluster(kStranger, 1)}, rets, 2000);
  EXPECT_THAT(rets, ElementsAre(LLM_SUCCESS, LLM_LINK_FAILED));
  EXPECT_EQ(mixed.code(), LLM_LINK_FAILED);
  EXPECT_THAT(mixed.text(), AllOf(StartsWith("LinkLlmClusters: "), HasSubstr("9")));
  EXPECT_TRUE(a_.Pull(kB, theirs_, mine_, {0}, {0}).ok()) << "the link that was made stays";

  rets = {77};
  EXPECT_EQ(provider.Link({}, rets, 2000).code(), LLM_PARAM_INVALID);
  EXPECT_THAT(rets, IsEmpty()) << "the call itself was refused";
  EXPECT_EQ(provider.Link({Cluster(kB, b_.port())}, rets, 0).code(), LLM_PARAM_INVALID);
  EXPECT_THAT(rets, IsEmpty());
  llm_datadist::ClusterInfo nameless = Cluster(kB, b_.port());
  nameless.remote_ip_infos[0].ip = "nowhere";
  EXPECT_EQ(provider.Link({nameless}, rets, 2000).code(), LLM_PARAM_INVALID);

  EXPECT_TRUE(provider.Unlink({Cluster(kB, b_.port()), Cluster(kStranger, 1)}, rets, 2000, true).ok())
      << "a link that is not there is unlinked";
  EXPECT_THAT(rets, ElementsAre(LLM_SUCCESS, LLM_SUCCESS));
}

TEST_P(ProviderContract, UnlinksAndLinksAnew) {
  for (const bool force : {false, true, false}) {
    Link();
    EXPECT_TRUE(a_.Pull(kB, theirs_, mine_, {0}, {0}).ok());
    const Status status = a_.Unlink(b_, force);
    ASSERT_TRUE(status.ok()) << status.text();
    EXPECT_EQ(a_.Pull(kB, theirs_, mine_, {0}, {0}).code(), LLM_NOT_YET_LINK);
    if (force) {  // its half, which nobody told it to drop
      ASSERT_TRUE(b_.Unlink(b_, true).ok());
      std::vector<llm_datadist::Status> rets;
      ASSERT_TRUE(b_.provider().Unlink({Cluster(kA, 0)}, rets, 2000, true).ok());
    }
  }
}

TEST_P(ProviderContract, APeerThatIsGoneFailsWithinTheTimeout) {
  Link();
  const uint16_t port = b_.port();
  b_.provider().Finalize();
  const Status pulled = a_.Pull(kB, theirs_, mine_, {0}, {0});
  EXPECT_FALSE(pulled.ok());
  EXPECT_THAT(pulled.text(), StartsWith("PullKvBlocks: "));
  std::vector<llm_datadist::Status> rets;
  EXPECT_EQ(a_.provider().Unlink({Cluster(kB, port)}, rets, 1000, false).code(), LLM_UNLINK_FAILED);
  EXPECT_TRUE(a_.provider().Unlink({Cluster(kB, port)}, rets, 1000, true).ok());
  EXPECT_EQ(a_.provider().Link({Cluster(kB, port)}, rets, 1000).code(), LLM_LINK_FAILED);
}

TEST_P(ProviderContract, MemoryIsRegisteredBeforeTheLinkWhereThatIsDemanded) {
  Link();
  const int64_t late_here = a_.AddCache(kShape, 3);
  const int64_t late_there = b_.AddCache(kShape, 4);
  const bool demanded = a_.provider().capabilities().register_before_link;
  EXPECT_EQ(a_.Pull(kB, late_there, mine_, {0}, {0}).ok(), !demanded);
  EXPECT_EQ(a_.Pull(kB, theirs_, late_here, {0}, {0}).ok(), !demanded);
  EXPECT_TRUE(a_.Pull(kB, theirs_, mine_, {0}, {0}).ok());
  ASSERT_TRUE(a_.Unlink(b_, false).ok());
  Link();
  EXPECT_TRUE(a_.Pull(kB, late_there, late_here, {0}, {0}).ok());
}

TEST_P(ProviderContract, RegistersAndUnregisters) {
  llm_datadist::CacheDesc desc{CachePlacement::kDevice, 1, DT_INT8, {4, 64}, {}};
  Bytes memory(4 * 64);
  const auto address = reinterpret_cast<uint64_t>(memory.data());
  Provider &provider = a_.provider();
  EXPECT_EQ(provider.RegisterKvCache(desc, {}).status().code(), LLM_PARAM_INVALID);
  EXPECT_EQ(provider.RegisterKvCache(desc, {address, address}).status().code(), LLM_PARAM_INVALID);
  EXPECT_EQ(provider.RegisterKvCache(desc, {0}).status().code(), LLM_PARAM_INVALID);
  EXPECT_TRUE(provider.RegisterKvCache(desc, {address}).ok());
  EXPECT_TRUE(provider.RegisterKvCache(desc, {address}).ok()) << "two caches of one memory";
  desc.num_tensors = 241;
  const Status many = provider.RegisterKvCache(desc, std::vector<uint64_t>(241, address)).status();
  EXPECT_EQ(many.code(), LLM_PARAM_INVALID);
  EXPECT_THAT(many.text(), AllOf(HasSubstr("241"), HasSubstr("240")));
  EXPECT_TRUE(provider.UnregisterKvCache(mine_).ok());
  EXPECT_TRUE(provider.UnregisterKvCache(mine_).ok()) << "an unknown id";
  Link();
  EXPECT_EQ(a_.Pull(kB, theirs_, mine_, {0}, {0}).code(), LLM_KV_CACHE_NOT_EXIST);
}

// As bindings and the queue call: from threads that enter first.
TEST_P(ProviderContract, GrantsWritesWhereItSaysSo) {
  const bool grants = a_.provider().capabilities().grants_writes;
  const Status granted = a_.provider().GrantWrites(kB, {{mine_, {0}}}).status();
  EXPECT_EQ(granted.code(), grants ? LLM_PARAM_INVALID : LLM_FEATURE_NOT_ENABLED) << "not by grant, or not at all";
  EXPECT_EQ(a_.provider().RevokeWrites(1).code(), grants ? llm_datadist::LLM_SUCCESS : LLM_FEATURE_NOT_ENABLED);
  EXPECT_EQ(grants, std::string(GetParam()) == "engine");
}

TEST_P(ProviderContract, TransfersFromThreadsOfAQueue) {
  Link();
  auto queue = TransferQueue::Create(a_.shared(), 2, 64);
  ASSERT_TRUE(queue.ok());
  Bytes expected = a_.Contents(mine_);
  for (uint64_t block = 0; block < 16; ++block) {
    CopyBlocks(b_.Contents(theirs_), kShape, expected, kShape, {block}, {15 - block});
    queue.value()->Submit(PullBlocksOp{a_.Blocks(kB, theirs_, mine_, {block}, {15 - block})}, std::chrono::seconds(20));
  }
  std::vector<Completion> done;
  ASSERT_TRUE(Eventually([&] {
    for (Completion &completion : queue.value()->Poll()) {
      done.push_back(std::move(completion));
    }
    return done.size() == 16;
  }));
  for (const Completion &completion : done) {
    EXPECT_EQ(completion.status, LLM_SUCCESS) << completion.error;
  }
  EXPECT_EQ(a_.Contents(mine_), expected);
}

// A call that runs is waited for or ended; later ones fail. (CANN's library would be in freed memory.)
TEST_P(ProviderContract, FinalizeMayRunBesideCalls) {
  Link();
  std::atomic<int> callers_with_a_call{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) {
    callers.emplace_back([&] {
      EXPECT_TRUE(a_.provider().EnterThread().ok());
      EXPECT_TRUE(a_.Pull(kB, theirs_, mine_, {0, 2, 4}, {1, 3, 5}).ok());
      ++callers_with_a_call;
      while (a_.Pull(kB, theirs_, mine_, {0, 2, 4}, {1, 3, 5}).ok()) {
      }
    });
  }
  ASSERT_TRUE(Eventually([&] { return callers_with_a_call == 3; }));
  a_.provider().Finalize();
  for (std::thread &caller : callers) {
    caller.join();
  }
  EXPECT_EQ(a_.Pull(kB, theirs_, mine_, {0}, {0}).code(), LLM_FAILED);
}

INSTANTIATE_TEST_SUITE_P(, ProviderContract, ::testing::Values("engine", "cann"),
                         [](const auto &instance) { return std::string(instance.param); });

}  // namespace
}  // namespace datadist::testing
