// RevokeWrites of grants under which somebody is just writing: when it says that the blocks are free, they are.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <thread>

#include "support/handmade_link.h"
#include "support/node.h"
#include "transport_support/requests.h"

namespace datadist::testing {
namespace {

using datadist::test::Encoded;
using datadist::test::GoodHeader;
using llm_datadist::GrantWrites;
using llm_datadist::LLM_LINK_BUSY;
using llm_datadist::LLM_PARAM_INVALID;
using llm_datadist::LLM_SUCCESS;
using llm_datadist::RevokeWrites;
using ::testing::HasSubstr;

constexpr uint64_t kOwner = 2;
constexpr uint64_t kPusher = 1;

// Memory of a cache whose every byte the test may look at and write.
class OpenCache {
 public:
  OpenCache(Node &node, uint64_t blocks, uint64_t block_bytes, uint8_t fill) : bytes_(blocks * block_bytes, fill) {
    llm_datadist::CacheDesc desc{};
    desc.num_tensors = 1;
    desc.data_type = llm_datadist::DT_UINT8;
    desc.shape = {static_cast<int64_t>(blocks), static_cast<int64_t>(block_bytes)};
    const std::vector<uint64_t> addrs{reinterpret_cast<uintptr_t>(bytes_.data())};
    EXPECT_EQ(node.datadist().RegisterKvCache(desc, addrs, {}, id_), LLM_SUCCESS) << llm_datadist::GetLastErrorText();
  }
  int64_t id() const { return id_; }
  // By calls for many bytes: one by one they take minutes under ThreadSanitizer.
  void Fill(uint8_t byte) { std::memset(bytes_.data(), byte, bytes_.size()); }
  bool IsAll(uint8_t byte, size_t from = 0, size_t to = SIZE_MAX) const {
    const uint8_t *const first = bytes_.data() + from;
    return *first == byte && std::memcmp(first, first + 1, std::min(to, bytes_.size()) - from - 1) == 0;
  }

 private:
  Bytes bytes_;
  int64_t id_ = 0;
};

Blocks FirstBlocks(uint64_t count) {
  Blocks blocks;
  for (uint64_t block = 0; block < count; ++block) {
    blocks.push_back(block);
  }
  return blocks;
}

class Revoked : public ::testing::TestWithParam<const char *> {};

// One pushes without a pause, whatever it is told.
TEST_P(Revoked, IsOverBeforeItIsSaid) {
  constexpr uint64_t kBlocks = 8;
  const TextOptions common{{llm_datadist::OPTION_TRANSPORT, GetParam()},
                           {llm_datadist::OPTION_SYNC_CACHE_WAIT_TIME, "60000"}};
  TextOptions granted = common;
  granted[llm_datadist::OPTION_PEER_ACCESS] = "granted";
  Node owner(kOwner);
  Node pusher(kPusher);
  ASSERT_EQ(owner.Start(ServerOptions(granted)), LLM_SUCCESS) << llm_datadist::GetLastErrorText();
  ASSERT_EQ(pusher.Start(ClientOptions(common)), LLM_SUCCESS) << llm_datadist::GetLastErrorText();
  OpenCache theirs(owner, kBlocks, 1 << 20, 0);
  OpenCache ours(pusher, kBlocks, 1 << 20, 1);
  ASSERT_EQ(pusher.Link(kOwner, owner.port()), LLM_SUCCESS) << llm_datadist::GetLastErrorText();
  const Blocks blocks = FirstBlocks(kBlocks);
  llm_datadist::Cache source{};
  source.cache_id = ours.id();
  source.cache_desc.placement = llm_datadist::CachePlacement::kDevice;
  std::atomic<bool> stop{false};
  std::atomic<int> pushed{0};
  std::atomic<int> refused{0};
  std::atomic<int> odd{0};
  std::thread pushing([&] {
    while (!stop.load()) {
      const llm_datadist::CacheIndex target{kOwner, theirs.id(), 0, {}};
      const auto status = pusher.datadist().PushKvBlocks(source, target, blocks, blocks, {});
      ++(status == LLM_SUCCESS ? pushed : status == LLM_PARAM_INVALID ? refused : odd);
    }
  });
  bool went_on = true;
  for (int round = 0; round < 20 && went_on; ++round) {
    uint64_t grant = 0;
    EXPECT_EQ(GrantWrites(owner.datadist(), kPusher, {{theirs.id(), blocks}}, grant), LLM_SUCCESS);
    const int before = pushed.load();
    went_on = Eventually([&] { return pushed.load() > before; });
    went_on &= Eventually([&] { return RevokeWrites(owner.datadist(), grant) == LLM_SUCCESS; });
    theirs.Fill(0x5A);
    const int refusals = refused.load();
    went_on &= Eventually([&] { return refused.load() > refusals + 1; });
    EXPECT_TRUE(theirs.IsAll(0x5A)) << "written after RevokeWrites had said that nobody does, round " << round;
  }
  stop.store(true);
  pushing.join();
  EXPECT_TRUE(went_on);
  EXPECT_EQ(odd.load(), 0);
}

INSTANTIATE_TEST_SUITE_P(Transports, Revoked, ::testing::Values("local", "cma", "tcp"),
                         [](const auto &kind) { return std::string(kind.param); });

// ---- by hand, over tcp: a peer that may stop anywhere ----

class ByHand : public ::testing::Test {
 protected:
  static constexpr uint64_t kBlocks = 4;
  static constexpr uint64_t kBlockBytes = 64;

  void SetUp() override {
    const TextOptions options{{llm_datadist::OPTION_TRANSPORT, "tcp"},
                              {llm_datadist::OPTION_PEER_ACCESS, "granted"},
                              {llm_datadist::OPTION_INSECURE, "1"},
                              {llm_datadist::OPTION_HEARTBEAT_MS, "60000"},  // strangers do not answer
                              {llm_datadist::OPTION_SYNC_CACHE_WAIT_TIME, "60000"}};
    ASSERT_EQ(owner_.Start(ServerOptions(options)), LLM_SUCCESS) << llm_datadist::GetLastErrorText();
    cache_.emplace(owner_, kBlocks, kBlockBytes, 0);
    link_.emplace(SocketAddress::FromIp(kLoopback, owner_.port()).value(), kPusher);
    link_->control.Hear(MessageType::kEstablished);
    link_->control.Say(MessageType::kDescribe, Encode(DescribeRequest{CacheRef::Id(cache_->id())}), 4);
    const auto info = Decode<CacheInfo>(link_->control.Hear(MessageType::kCacheInfo).body);
    ASSERT_TRUE(info.ok() && info.value().status.ok());
    remote_ = info.value().target.cache;
  }

  uint64_t Grant(const Blocks &blocks) {
    uint64_t grant = 0;
    EXPECT_EQ(GrantWrites(owner_.datadist(), kPusher, {{cache_->id(), blocks}}, grant), LLM_SUCCESS)
        << llm_datadist::GetLastErrorText();
    return grant;
  }
  // The owner's answer to the announcement of a push.
  llm_datadist::Status Announce(const std::vector<Span> &spans, uint32_t first_tensor = 0, uint32_t tensors = 1) {
    RequestHeader header = GoodHeader(remote_);
    header.op = DataOp::kPush;
    header.first_tensor = first_tensor;
    header.tensor_count = tensors;
    header.span_count = static_cast<uint32_t>(spans.size());
    header.total_bytes = 0;
    for (const Span &span : spans) {
      header.total_bytes += span.length * tensors;
    }
    const std::vector<uint8_t> bytes = Encoded(header, spans);
    EXPECT_TRUE(SendAll(link_->served.get(), bytes.data(), bytes.size(), Soon()).ok());
    return Answer();
  }
  llm_datadist::Status Answer() {
    uint8_t bytes[kResponseHeaderBytes];
    EXPECT_TRUE(RecvAll(link_->served.get(), bytes, sizeof(bytes), Soon()).ok());
    const auto header = DecodeResponseHeader(bytes);
    EXPECT_TRUE(header.ok());
    std::string text(header.ok() ? header.value().text_bytes : 0, '\0');
    EXPECT_TRUE(RecvAll(link_->served.get(), text.data(), text.size(), Soon()).ok());
    return header.ok() ? header.value().status : llm_datadist::LLM_FAILED;
  }
  void SendPayload(size_t size) {
    const Bytes bytes(size, 1);
    EXPECT_TRUE(SendAll(link_->served.get(), bytes.data(), bytes.size(), Soon()).ok());
  }
  Status AskDigest(const std::vector<Span> &ranges) {
    link_->control.Say(MessageType::kDigest,
                       Encode(DigestRequest{remote_.cache_id, remote_.generation, 0, 1, 20'000, ranges}), ++seq_);
    const auto digests = Decode<Digests>(link_->control.Hear(MessageType::kDigests).body);
    EXPECT_TRUE(digests.ok());
    return digests.ok() ? digests.value().status : digests.status();
  }

  Node owner_{kOwner};
  std::optional<OpenCache> cache_;
  std::optional<HandmadeLink> link_;
  RemoteCache remote_;
  uint32_t seq_ = 10;
};

TEST_F(ByHand, AGrantIsInUseFromTheCheckToTheLastByte) {
  const uint64_t grant = Grant({1, 2});
  ASSERT_EQ(Announce({{kBlockBytes, 2 * kBlockBytes}}), LLM_SUCCESS);
  EXPECT_EQ(RevokeWrites(owner_.datadist(), grant), LLM_LINK_BUSY) << "it passed the check";
  EXPECT_STREQ(llm_datadist::GetLastErrorText(), "") << "an answer, not a failure";
  SendPayload(2 * kBlockBytes - 1);
  EXPECT_EQ(RevokeWrites(owner_.datadist(), grant), LLM_LINK_BUSY);
  SendPayload(1);
  ASSERT_EQ(Answer(), LLM_SUCCESS);
  EXPECT_EQ(RevokeWrites(owner_.datadist(), grant), LLM_SUCCESS) << "who was told that it is done finds it done";
  EXPECT_TRUE(cache_->IsAll(1, kBlockBytes, 3 * kBlockBytes));
  EXPECT_TRUE(cache_->IsAll(0, 0, kBlockBytes) && cache_->IsAll(0, 3 * kBlockBytes));
  EXPECT_EQ(Announce({{kBlockBytes, kBlockBytes}}), LLM_PARAM_INVALID);
}

// It neither sends nor reads any more, in the middle of a push.
TEST_F(ByHand, AFrozenPusherIsGotRidOfByUnlinkingIt) {
  const uint64_t grant = Grant({1, 2});
  ASSERT_EQ(Announce({{kBlockBytes, 2 * kBlockBytes}}), LLM_SUCCESS);
  SendPayload(kBlockBytes);
  EXPECT_EQ(RevokeWrites(owner_.datadist(), grant), LLM_LINK_BUSY);
  std::vector<llm_datadist::Status> rets;
  llm_datadist::ClusterInfo peer{};
  peer.remote_cluster_id = kPusher;
  const auto began = std::chrono::steady_clock::now();
  EXPECT_EQ(owner_.datadist().UnlinkLlmClusters({peer}, rets, 1000, true), LLM_SUCCESS);
  EXPECT_EQ(RevokeWrites(owner_.datadist(), grant), LLM_SUCCESS);
  EXPECT_LT(std::chrono::steady_clock::now() - began, std::chrono::seconds(20)) << "well before the push is over";
  cache_->Fill(0x5A);
  SendAll(link_->served.get(), "late", 4, Soon()).ok();
  EXPECT_TRUE(cache_->IsAll(0x5A));
}

TEST_F(ByHand, WhoeverAsksForMoreThanThereIsIsRefused) {
  Grant({0, 1, 2, 3});
  const std::vector<std::vector<Span>> hostile{{{kBlocks * kBlockBytes, 1}},
                                               {{0, kBlocks * kBlockBytes + 1}},
                                               {{UINT64_MAX, 2}},
                                               {{UINT64_MAX - 1, 2}},
                                               {{0, kBlockBytes}, {UINT64_MAX - 63, kBlockBytes}}};
  for (const std::vector<Span> &spans : hostile) {
    EXPECT_EQ(Announce(spans), LLM_PARAM_INVALID) << spans.back().offset;
  }
  EXPECT_EQ(Announce({{0, 1}}, 1), LLM_PARAM_INVALID);
  EXPECT_EQ(Announce({{0, 1}}, 0, 2), LLM_PARAM_INVALID);
  EXPECT_EQ(Announce({{0, 1}}, UINT32_MAX, 2), LLM_PARAM_INVALID);
  EXPECT_EQ(Announce({{0, 1}}, UINT32_MAX, UINT32_MAX), LLM_PARAM_INVALID);
  ASSERT_EQ(Announce({{0, kBlockBytes}}), LLM_SUCCESS) << "the connection goes on";
  SendPayload(kBlockBytes);
  EXPECT_EQ(Answer(), LLM_SUCCESS);
}

TEST_F(ByHand, DigestsAreOfWhatWasGranted) {
  EXPECT_EQ(AskDigest({{0, kBlockBytes}}).code(), LLM_PARAM_INVALID);
  const uint64_t grant = Grant({1, 2});
  EXPECT_TRUE(AskDigest({{kBlockBytes, 2 * kBlockBytes}}).ok());
  EXPECT_EQ(AskDigest({{kBlockBytes, kBlockBytes}, {0, 1}}).code(), LLM_PARAM_INVALID);
  EXPECT_EQ(AskDigest({{kBlockBytes, 2 * kBlockBytes + 1}}).code(), LLM_PARAM_INVALID);
  EXPECT_EQ(AskDigest({}).code(), LLM_PARAM_INVALID);
  EXPECT_EQ(RevokeWrites(owner_.datadist(), grant), LLM_SUCCESS);
  EXPECT_EQ(AskDigest({{kBlockBytes, kBlockBytes}}).code(), LLM_PARAM_INVALID);
}

}  // namespace
}  // namespace datadist::testing
