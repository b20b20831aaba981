// The codes of every call, and which of several errors a caller sees first.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <thread>

#include "support/eventually.h"
#include "support/node.h"

namespace datadist::testing {
namespace {

using namespace llm_datadist;  // the codes, which every line here names
using ::testing::HasSubstr;
using ::testing::StrEq;

constexpr uint64_t kA = 1;
constexpr uint64_t kB = 2;
constexpr uint64_t kStranger = 9;
constexpr int64_t kNoCache = 1234;
// The cache of the specification's worked examples: 10 tensors of {4, 16} int32, so 4 blocks of 64 bytes and 5 layers.
constexpr Shape kShape{10, 4, 64};

KvCacheExtParam Layers(int32_t src_first, int32_t src_last, int32_t dst_first, int32_t dst_last,
                       uint8_t per_layer = 2) {
  return {{src_first, src_last}, {dst_first, dst_last}, per_layer, {}};
}

class TwoEndpoints : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(b_.Start(ServerOptions()), LLM_SUCCESS) << GetLastErrorText();
    ASSERT_EQ(a_.Start(ClientOptions()), LLM_SUCCESS) << GetLastErrorText();
    mine_ = a_.AddCache(kShape, 1);
    theirs_ = b_.AddCache(kShape, 2);
  }
  void Link() { ASSERT_EQ(a_.Link(kB, b_.port()), LLM_SUCCESS) << GetLastErrorText(); }
  Status PushWith(const Cache &src, uint64_t cluster, int64_t cache, const Blocks &from, const Blocks &to,
                  uint32_t batch_index = 0) {
    return a_.datadist().PushKvBlocks(src, {cluster, cache, batch_index, {}}, from, to, {});
  }
  Status PullFromBatch(uint32_t batch_index, const Blocks &from) {
    return a_.datadist().PullKvBlocks({kB, theirs_, batch_index, {}}, a_.Handle(mine_), from, {0}, {});
  }
  Node a_{kA};
  Node b_{kB};
  int64_t mine_ = 0;
  int64_t theirs_ = 0;
};

TEST(NotInitialized, EveryCallFails) {
  Node node(kA);
  LlmDataDist &datadist = node.datadist();
  Cache cache{};
  int64_t id = 55;
  std::vector<Status> rets = {77};
  EXPECT_EQ(datadist.SetRole(LlmRole::kMix), LLM_FAILED);
  EXPECT_EQ(datadist.LinkLlmClusters({}, rets), LLM_FAILED);
  EXPECT_EQ(datadist.UnlinkLlmClusters({}, rets), LLM_FAILED);
  EXPECT_EQ(rets, std::vector<Status>{77}) << "a refused call leaves rets alone";
  EXPECT_EQ(datadist.PullKvCache({}, cache), LLM_FAILED);
  EXPECT_EQ(datadist.PullKvBlocks({}, cache, {}, {}), LLM_FAILED);
  EXPECT_EQ(datadist.PushKvCache(cache, {}), LLM_FAILED);
  EXPECT_EQ(datadist.PushKvBlocks(cache, {}, {}, {}), LLM_FAILED);
  EXPECT_EQ(datadist.RegisterKvCache({}, {}, {}, id), LLM_FAILED);
  EXPECT_EQ(id, 55);
  EXPECT_EQ(datadist.UnregisterKvCache(1), LLM_FAILED);
  EXPECT_THAT(GetLastErrorText(), StrEq("UnregisterKvCache: LLM_FAILED (0xFFFFFFFF): not initialized"));
  uint16_t port = 0;
  EXPECT_EQ(QueryListenPort(datadist, port), LLM_FAILED);

  EXPECT_EQ(datadist.AllocateCache({}, cache), LLM_FAILED);
  EXPECT_EQ(datadist.DeallocateCache(1), LLM_FAILED);
  EXPECT_EQ(datadist.CopyKvCache(cache, cache), LLM_FAILED);
  EXPECT_EQ(datadist.CopyKvBlocks(cache, cache, {}, {}), LLM_FAILED);
  datadist.Finalize();
}

TEST_F(TwoEndpoints, InitializeAndFinalizeAreIdempotentAndIdsStartAgain) {
  EXPECT_EQ(a_.datadist().Initialize({}), LLM_SUCCESS) << "options of a second call are not looked at";
  a_.datadist().Finalize();
  a_.datadist().Finalize();
  EXPECT_EQ(a_.Pull(kB, theirs_, mine_, {0}, {0}), LLM_FAILED);
  EXPECT_EQ(a_.Start(ClientOptions()), LLM_SUCCESS);
  EXPECT_EQ(a_.AddCache(kShape, 1), 1);
  EXPECT_EQ(a_.AddCache(kShape, 1), 2);
}

TEST_F(TwoEndpoints, LastErrorIsOfTheThreadsLastCall) {
  EXPECT_EQ(a_.Pull(kB, theirs_, mine_, {0}, {0}), LLM_NOT_YET_LINK);
  EXPECT_THAT(GetLastErrorText(), StrEq("PullKvBlocks: LLM_NOT_YET_LINK (0x5010B007): no link to cluster 2"));
  std::thread([&] {
    EXPECT_STREQ(GetLastErrorText(), "") << "another thread's";
    int64_t id = 55;
    EXPECT_EQ(a_.datadist().RegisterKvCache({}, {}, {}, id), LLM_PARAM_INVALID);
    EXPECT_EQ(id, 55) << "written on success only";
    EXPECT_THAT(GetLastErrorText(), HasSubstr("addrs is empty"));
  }).join();
  EXPECT_THAT(GetLastErrorText(), HasSubstr("no link to cluster 2"));
  EXPECT_STREQ(GetStatusName(LLM_NOT_YET_LINK), "LLM_NOT_YET_LINK");
  EXPECT_STREQ(GetStatusName(0x1234), "LLM_UNKNOWN");
  EXPECT_EQ(a_.datadist().UnregisterKvCache(0), LLM_SUCCESS);
  EXPECT_STREQ(GetLastErrorText(), "");
}

// One line for each failure, at the level that programs have unless they say otherwise, and no flood of them.
TEST_F(TwoEndpoints, FailuresAreLogged) {
  std::string once;
  ASSERT_TRUE(Eventually([&] {  // other tests may have used up this second's lines
    ::testing::internal::CaptureStderr();
    EXPECT_EQ(a_.Pull(kB, theirs_, mine_, {0}, {0}), LLM_NOT_YET_LINK);
    once = ::testing::internal::GetCapturedStderr();
    return !once.empty();
  }));
  EXPECT_THAT(once, HasSubstr("ERROR PullKvBlocks: LLM_NOT_YET_LINK (0x5010B007): no link to cluster 2\n"));
  EXPECT_EQ(std::count(once.begin(), once.end(), '\n'), 1);

  ::testing::internal::CaptureStderr();
  EXPECT_EQ(a_.datadist().UnregisterKvCache(0), LLM_SUCCESS);
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "");

  ::testing::internal::CaptureStderr();
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 1000; ++i) {
    (void)a_.Pull(kB, theirs_, mine_, {0}, {0});
  }
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(std::chrono::steady_clock::now() - start);
  const std::string flood = ::testing::internal::GetCapturedStderr();
  EXPECT_LE(std::count(flood.begin(), flood.end(), '\n'), 10 * (seconds.count() + 2));
}

TEST_F(TwoEndpoints, ListenPort) {
  uint16_t port = 0;
  EXPECT_EQ(QueryListenPort(b_.datadist(), port), LLM_SUCCESS);
  EXPECT_NE(port, 0);
  EXPECT_EQ(QueryListenPort(a_.datadist(), port), LLM_FEATURE_NOT_ENABLED);
}

TEST_F(TwoEndpoints, LinkCallChecks) {
  LlmDataDist &a = a_.datadist();
  std::vector<Status> rets = {77};
  const uint16_t port = b_.port();
  EXPECT_EQ(a.LinkLlmClusters({Cluster(kB, port)}, rets, 0), LLM_PARAM_INVALID);
  EXPECT_THAT(GetLastErrorText(), HasSubstr("timeout_in_millis: 0"));
  ClusterInfo bad_ip = Cluster(kB, port);
  bad_ip.remote_ip_infos[0].ip = "localhost";
  EXPECT_EQ(a.LinkLlmClusters({Cluster(kB, port), bad_ip}, rets, 100), LLM_PARAM_INVALID);
  EXPECT_THAT(GetLastErrorText(), HasSubstr("clusters[1].remote_ip_infos[0]: ip 'localhost'"));
  EXPECT_EQ(a.LinkLlmClusters({}, rets, 100), LLM_PARAM_INVALID);
  EXPECT_EQ(a.UnlinkLlmClusters({}, rets, 100), LLM_PARAM_INVALID);
  EXPECT_EQ(rets, std::vector<Status>{77});

  ClusterInfo no_ip = Cluster(kB, port);
  no_ip.remote_ip_infos.clear();
  ClusterInfo no_local = Cluster(kB, port);
  no_local.local_ip_infos.clear();
  EXPECT_EQ(a.LinkLlmClusters({no_local}, rets, 1000), LLM_PARAM_INVALID);
  EXPECT_THAT(GetLastErrorText(), HasSubstr("local_ip_infos"));
  EXPECT_EQ(a.LinkLlmClusters({no_ip, Cluster(kB, port)}, rets, 1000), LLM_PARAM_INVALID) << "partial success stays";
  EXPECT_EQ(rets, (std::vector<Status>{LLM_PARAM_INVALID, LLM_SUCCESS}));
  EXPECT_TRUE(a_.Alive(kB));
  EXPECT_EQ(a.UnlinkLlmClusters({no_ip}, rets, 1000), LLM_PARAM_INVALID);
  EXPECT_EQ(a.UnlinkLlmClusters({no_ip}, rets, 1000, true), LLM_SUCCESS) << "force needs no address";
  EXPECT_EQ(rets, std::vector<Status>{LLM_SUCCESS});
  EXPECT_EQ(a.LinkLlmClusters({no_local}, rets, 1000), LLM_SUCCESS) << "known from the first link";
}

TEST_F(TwoEndpoints, PeersThatCanBeAccessedHaveAnIdOfTheirOwn) {
  Node same(kB);
  ASSERT_EQ(same.Start(ClientOptions()), LLM_SUCCESS);
  EXPECT_EQ(same.Link(kB, b_.port()), LLM_PARAM_INVALID);
  EXPECT_THAT(GetLastErrorText(), HasSubstr("cluster id 2 is the server's own"));
}

TEST_F(TwoEndpoints, LocalCommResIsJudgedWhenLinking) {
  for (const char *bad : {"mock", "{\"version\":\"9.9\"}", "{}", "{\"version\":\"1.0\"", "[]"}) {
    SCOPED_TRACE(bad);
    Node node(7);
    ASSERT_EQ(node.Start(ClientOptions({{OPTION_LOCAL_COMM_RES, bad}})), LLM_SUCCESS);
    EXPECT_EQ(node.Link(kB, b_.port()), LLM_PARAM_INVALID);
    EXPECT_THAT(GetLastErrorText(), HasSubstr(OPTION_LOCAL_COMM_RES));
  }
  for (const char *good : {"", R"({"version":"1.3"})", R"({"server_list":[],"status":"completed","version":"1.0"})"}) {
    SCOPED_TRACE(good);
    Node node(7);
    ASSERT_EQ(node.Start(ClientOptions({{OPTION_LOCAL_COMM_RES, good}})), LLM_SUCCESS);
    EXPECT_EQ(node.Link(kB, b_.port()), LLM_SUCCESS) << GetLastErrorText();
  }
}

TEST_F(TwoEndpoints, PullArguments) {
  Link();
  EXPECT_EQ(a_.Pull(kB, theirs_, mine_, {0, 1, 3}, {2, 3, 0}), LLM_SUCCESS) << GetLastErrorText();
  EXPECT_EQ(PullFromBatch(1, {0}), LLM_PARAM_INVALID);
  EXPECT_EQ(a_.Pull(kB, theirs_, mine_, {}, {}), LLM_PARAM_INVALID);
  EXPECT_EQ(a_.Pull(kB, theirs_, mine_, {0}, {0, 1}), LLM_PARAM_INVALID);
  EXPECT_EQ(a_.Pull(kA, theirs_, mine_, {0}, {0}), LLM_PARAM_INVALID) << "our own id";
  EXPECT_EQ(a_.Pull(kB, theirs_, mine_, {0}, {4}), LLM_PARAM_INVALID);
  EXPECT_EQ(a_.Pull(kB, theirs_, mine_, {4}, {0}), LLM_PARAM_INVALID);
  EXPECT_THAT(GetLastErrorText(), HasSubstr("src_blocks"));
  EXPECT_EQ(a_.Pull(kB, theirs_, mine_, {~0ULL}, {0}), LLM_PARAM_INVALID);
  EXPECT_EQ(a_.Pull(kB, 0, mine_, {0}, {0}), LLM_KV_CACHE_NOT_EXIST);
  EXPECT_EQ(a_.Pull(kB, -1, mine_, {0}, {0}), LLM_KV_CACHE_NOT_EXIST);
  EXPECT_EQ(a_.Pull(kB, kNoCache, mine_, {0}, {0}), LLM_KV_CACHE_NOT_EXIST);
  EXPECT_TRUE(a_.Alive(kB)) << "a wrong argument costs no link";
}

TEST_F(TwoEndpoints, PullLayerRanges) {
  Link();
  const auto pull = [&](const KvCacheExtParam &ext) { return a_.Pull(kB, theirs_, mine_, {0}, {0}, ext); };
  for (const uint8_t per_layer : {uint8_t{1}, uint8_t{2}}) {
    EXPECT_EQ(pull(Layers(0, 1, 0, 1, per_layer)), LLM_SUCCESS) << GetLastErrorText();
  }
  for (const uint8_t per_layer : {uint8_t{0}, uint8_t{3}, uint8_t{7}, uint8_t{17}}) {
    EXPECT_EQ(pull(Layers(0, 1, 0, 1, per_layer)), LLM_PARAM_INVALID) << int{per_layer};
  }
  EXPECT_EQ(pull(Layers(-2, 1, 0, 1)), LLM_PARAM_INVALID);
  EXPECT_EQ(pull(Layers(1, 0, 1, 0)), LLM_PARAM_INVALID);
  EXPECT_EQ(pull(Layers(0, 1, 0, 2)), LLM_PARAM_INVALID);
  EXPECT_EQ(pull(Layers(4, 5, 0, 1)), LLM_PARAM_INVALID) << "beyond the remote layers";
  EXPECT_EQ(pull(Layers(0, 1, 4, 5)), LLM_PARAM_INVALID) << "beyond the local layers";
  for (const KvCacheExtParam &one : {Layers(-1, -1, 0, 0), Layers(1, 1, -1, -1), Layers(-1, 0, -1, 0)}) {
    const Bytes untouched = a_.Contents(mine_);
    EXPECT_EQ(pull(one), LLM_PARAM_INVALID) << "one range alone";
    EXPECT_THAT(GetLastErrorText(), HasSubstr("_layer_range"));
    EXPECT_EQ(a_.Contents(mine_), untouched);
  }
  EXPECT_EQ(pull(Layers(-1, -1, -1, -1, 3)), LLM_SUCCESS) << "selects nothing";

  const Bytes before = a_.Contents(mine_);
  Bytes expected = before;
  const Bytes theirs = b_.Contents(theirs_);
  ASSERT_EQ(a_.Pull(kB, theirs_, mine_, {1}, {3}, Layers(1, 2, 0, 1)), LLM_SUCCESS);
  for (size_t tensor = 0; tensor < 4; ++tensor) {
    std::copy_n(theirs.begin() + static_cast<std::ptrdiff_t>((tensor + 2) * 256 + 64), 64,
                expected.begin() + static_cast<std::ptrdiff_t>(tensor * 256 + 192));
  }
  EXPECT_EQ(a_.Contents(mine_), expected);
}

TEST_F(TwoEndpoints, PullErrorPrecedence) {
  EXPECT_EQ(a_.Pull(kStranger, kNoCache, kNoCache, {}, {}), LLM_PARAM_INVALID) << "arguments before the local cache";
  EXPECT_EQ(a_.Pull(kStranger, kNoCache, kNoCache, {0}, {0}), LLM_KV_CACHE_NOT_EXIST) << "local cache before the link";
  EXPECT_THAT(GetLastErrorText(), HasSubstr("local cache 1234 is not registered"));
  EXPECT_EQ(a_.Pull(kStranger, kNoCache, mine_, {0}, {0}, Layers(0, 1, 4, 5)), LLM_PARAM_INVALID)
      << "local layers before the link";
  EXPECT_EQ(a_.Pull(kStranger, kNoCache, mine_, {0}, {99}), LLM_NOT_YET_LINK) << "link before local block indices";
  Link();
  EXPECT_EQ(a_.Pull(kB, kNoCache, mine_, {0}, {99}), LLM_PARAM_INVALID) << "local blocks before the remote cache";
  EXPECT_EQ(a_.Pull(kB, kNoCache, mine_, {99}, {0}), LLM_KV_CACHE_NOT_EXIST) << "remote cache before its blocks";
}

TEST_F(TwoEndpoints, PushArguments) {
  Link();
  Cache src = a_.Handle(mine_);
  EXPECT_EQ(PushWith(src, kB, theirs_, {0}, {1}), LLM_SUCCESS) << GetLastErrorText();
  EXPECT_EQ(PushWith(src, kB, theirs_, {}, {}), LLM_PARAM_INVALID);
  EXPECT_EQ(PushWith(src, kB, theirs_, {0}, {0, 1}), LLM_PARAM_INVALID);
  EXPECT_EQ(PushWith(src, kB, theirs_, {0}, {0}, 1), LLM_PARAM_INVALID);
  EXPECT_EQ(PushWith(src, kB, theirs_, {4}, {0}), LLM_PARAM_INVALID);
  EXPECT_EQ(PushWith(src, kB, theirs_, {0}, {4}), LLM_PARAM_INVALID);
  src.cache_desc.placement = CachePlacement::kHost;
  EXPECT_EQ(PushWith(src, kB, theirs_, {0}, {1}), LLM_PARAM_INVALID);
  Cache no_desc{};
  no_desc.cache_id = mine_;
  ASSERT_NE(b_.Contents(theirs_), a_.Contents(mine_));
  EXPECT_EQ(PushWith(no_desc, kB, theirs_, {0, 1, 2, 3}, {0, 1, 2, 3}), LLM_SUCCESS) << GetLastErrorText();
  EXPECT_EQ(b_.Contents(theirs_), a_.Contents(mine_)) << "every tensor that is registered";
  no_desc.cache_id = kNoCache;
  EXPECT_EQ(PushWith(no_desc, kB, theirs_, {0}, {1}), LLM_KV_CACHE_NOT_EXIST);
}

// Layers before the one that fails are written, and none after it.
TEST_F(TwoEndpoints, PushedLayersThatThePeerHasNotAreTheLast) {
  const Shape longer{14, 4, 64};
  const int64_t ours = a_.AddCache(longer, 9);
  Link();
  Bytes expected = b_.Contents(theirs_);
  const Bytes mine = a_.Contents(ours);
  EXPECT_EQ(a_.Push(ours, kB, theirs_, {1}, {3}, Layers(3, 6, 2, 5)), LLM_PARAM_INVALID);
  EXPECT_THAT(GetLastErrorText(), HasSubstr("layer 6"));
  for (size_t tensor = 4; tensor < 10; ++tensor) {
    std::copy_n(mine.begin() + static_cast<std::ptrdiff_t>((tensor + 2) * 256 + 64), 64,
                expected.begin() + static_cast<std::ptrdiff_t>(tensor * 256 + 192));
  }
  EXPECT_EQ(b_.Contents(theirs_), expected);
}

// However many go together: where layers share memory, the last one's bytes stay.
TEST_F(TwoEndpoints, PushedLayersAreWrittenInTheirOrder) {
  std::vector<uint8_t> shared(256);
  llm_datadist::CacheDesc desc{};
  desc.num_tensors = 10;
  desc.data_type = llm_datadist::DT_UINT8;
  desc.shape = {4, 64};
  int64_t one_place = 0;
  const std::vector<uint64_t> addrs(10, reinterpret_cast<uintptr_t>(shared.data()));
  ASSERT_EQ(b_.datadist().RegisterKvCache(desc, addrs, {}, one_place), LLM_SUCCESS) << GetLastErrorText();
  Link();
  ASSERT_EQ(a_.Push(mine_, kB, one_place, {0, 1, 2, 3}, {0, 1, 2, 3}), LLM_SUCCESS) << GetLastErrorText();
  ASSERT_EQ(b_.datadist().UnregisterKvCache(one_place), LLM_SUCCESS);
  const Bytes mine = a_.Contents(mine_);
  EXPECT_EQ(shared, Bytes(mine.end() - 256, mine.end()));
}

TEST_F(TwoEndpoints, PushLayerRanges) {
  Link();
  const auto push = [&](const KvCacheExtParam &ext) { return a_.Push(mine_, kB, theirs_, {0}, {0}, ext); };
  EXPECT_EQ(push({}), LLM_SUCCESS) << GetLastErrorText();
  EXPECT_EQ(push(Layers(0, 1, 0, 1, 1)), LLM_SUCCESS);
  EXPECT_EQ(push(Layers(0, 1, 0, 1, 2)), LLM_SUCCESS);
  for (const uint8_t per_layer : {uint8_t{3}, uint8_t{7}, uint8_t{17}}) {
    EXPECT_EQ(push(Layers(0, 1, 0, 1, per_layer)), LLM_PARAM_INVALID) << int{per_layer};
  }
  EXPECT_EQ(push(Layers(-2, 0, 0, 1)), LLM_PARAM_INVALID);
  EXPECT_EQ(push(Layers(0, 1, 0, 2)), LLM_PARAM_INVALID);
  EXPECT_EQ(push(Layers(4, 5, 4, 5)), LLM_PARAM_INVALID);
  for (const KvCacheExtParam &one : {Layers(-1, -1, 1, 1), Layers(0, 0, -1, -1), Layers(-1, 0, -1, 0)}) {
    const Bytes untouched = b_.Contents(theirs_);
    EXPECT_EQ(push(one), LLM_PARAM_INVALID) << "one range alone";
    EXPECT_THAT(GetLastErrorText(), HasSubstr("_layer_range"));
    EXPECT_EQ(b_.Contents(theirs_), untouched);
  }

  Bytes expected = b_.Contents(theirs_);
  const Bytes mine = a_.Contents(mine_);
  ASSERT_EQ(a_.Push(mine_, kB, theirs_, {1}, {3}, Layers(1, 2, 0, 1)), LLM_SUCCESS);
  for (size_t tensor = 0; tensor < 4; ++tensor) {
    std::copy_n(mine.begin() + static_cast<std::ptrdiff_t>((tensor + 2) * 256 + 64), 64,
                expected.begin() + static_cast<std::ptrdiff_t>(tensor * 256 + 192));
  }
  EXPECT_EQ(b_.Contents(theirs_), expected);
}

// Three tensors are no two per layer, and need not be where every layer is meant.
TEST_F(TwoEndpoints, PushOfUnevenLayers) {
  const Shape uneven{3, 4, 64};
  const int64_t from = a_.AddCache(uneven, 3);
  const int64_t to = b_.AddCache(uneven, 4);
  Link();
  ASSERT_EQ(a_.Push(from, kB, to, {0, 1, 2, 3}, {0, 1, 2, 3}), LLM_SUCCESS) << GetLastErrorText();
  EXPECT_EQ(b_.Contents(to), PatternContents(uneven, 3));
}

TEST_F(TwoEndpoints, PushErrorPrecedence) {
  EXPECT_EQ(a_.Push(kNoCache, kStranger, kNoCache, {0}, {0}), LLM_KV_CACHE_NOT_EXIST) << "local cache before the link";
  EXPECT_EQ(a_.Push(mine_, kStranger, kNoCache, {99}, {0}), LLM_NOT_YET_LINK) << "link before local blocks";
  Link();
  EXPECT_EQ(a_.Push(mine_, kB, kNoCache, {99}, {0}), LLM_KV_CACHE_NOT_EXIST) << "remote cache before local blocks";
}

TEST_F(TwoEndpoints, DifferentStridesAreRefusedBothWays) {
  const int64_t other = b_.AddCache(Shape{10, 4, 128}, 3);
  Link();
  EXPECT_EQ(a_.Pull(kB, other, mine_, {0}, {0}), LLM_PARAM_INVALID);
  EXPECT_EQ(a_.Push(mine_, kB, other, {0}, {0}), LLM_PARAM_INVALID);
}

TEST_F(TwoEndpoints, CacheRegisteredAfterTheLinkCanBePulled) {
  Link();
  const int64_t late = b_.AddCache(kShape, 5);
  EXPECT_EQ(a_.Pull(kB, late, mine_, {0}, {0}), LLM_SUCCESS) << GetLastErrorText();
}

TEST_F(TwoEndpoints, ChildOfForkIsRefused) {
  Link();
  const pid_t child = ::fork();
  if (child == 0) {
    const bool refused = a_.Pull(kB, theirs_, mine_, {0}, {0}) == LLM_FAILED &&
                         std::string(GetLastErrorText()).find("fork") != std::string::npos;
    a_.datadist().Finalize();
    ::_exit(refused ? 0 : 1);
  }
  int result = -1;
  ASSERT_EQ(::waitpid(child, &result, 0), child);
  EXPECT_EQ(result, 0);
  EXPECT_EQ(a_.Pull(kB, theirs_, mine_, {0}, {0}), LLM_SUCCESS) << "the parent is not disturbed";
}

}  // namespace
}  // namespace datadist::testing
