// PullKvCache and PushKvCache between two endpoints: the bytes, the codes, and which of several errors comes first.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "support/node.h"

namespace datadist::testing {
namespace {

using namespace llm_datadist;  // the codes, which every line here names
using ::testing::HasSubstr;

constexpr uint64_t kA = 1;
constexpr uint64_t kB = 2;
constexpr uint64_t kStranger = 9;
constexpr int64_t kNoCache = 1234;
// The cache of the specification's worked examples: 10 tensors of 4 rows of 64 bytes, 5 layers.
constexpr Shape kShape{10, 4, 64};

KvCacheExtParam Layers(int32_t src_first, int32_t src_last, int32_t dst_first, int32_t dst_last,
                       uint8_t per_layer = 2) {
  return {{src_first, src_last}, {dst_first, dst_last}, per_layer, {}};
}

class Rows : public ::testing::TestWithParam<const char *> {
 protected:
  void SetUp() override {
    ASSERT_EQ(b_.Start(ServerOptions({{OPTION_TRANSPORT, GetParam()}})), LLM_SUCCESS) << GetLastErrorText();
    ASSERT_EQ(a_.Start(ClientOptions({{OPTION_TRANSPORT, GetParam()}})), LLM_SUCCESS) << GetLastErrorText();
    mine_ = a_.AddCache(kShape, 1);
    theirs_ = b_.AddCache(kShape, 2);
    mine_bytes_ = PatternContents(kShape, 1);
    theirs_bytes_ = PatternContents(kShape, 2);
  }
  void Link() { ASSERT_EQ(a_.Link(kB, b_.port()), LLM_SUCCESS) << GetLastErrorText(); }

  Status Pull(uint32_t src_row, uint32_t dst_row, int64_t size = -1, const KvCacheExtParam &ext = {},
              uint64_t cluster = kB, int64_t src_cache = 1, int64_t dst_cache = 1) {
    return a_.datadist().PullKvCache({cluster, src_cache, src_row, {}}, a_.Handle(dst_cache), dst_row, size, ext);
  }
  Status Push(uint32_t src_row, uint32_t dst_row, int64_t size = -1, const KvCacheExtParam &ext = {},
              uint64_t cluster = kB, int64_t src_cache = 1, int64_t dst_cache = 1) {
    return a_.datadist().PushKvCache(a_.Handle(src_cache), {cluster, dst_cache, dst_row, {}}, src_row, size, ext);
  }
  // `length` bytes of row src_row of tensor src_tensor to row dst_row of dst_tensor, the slow way.
  static void Copy(const Bytes &from, Bytes &to, size_t src_tensor, size_t src_row, size_t dst_tensor, size_t dst_row,
                   size_t length = 64) {
    for (size_t i = 0; i < length; ++i) {
      to[dst_tensor * 256 + dst_row * 64 + i] = from[src_tensor * 256 + src_row * 64 + i];
    }
  }
  void ExpectBytes() {
    EXPECT_EQ(a_.Contents(mine_), mine_bytes_);
    EXPECT_EQ(b_.Contents(theirs_), theirs_bytes_);
  }

  Node a_{kA};
  Node b_{kB};
  int64_t mine_ = 0;
  int64_t theirs_ = 0;
  Bytes mine_bytes_;
  Bytes theirs_bytes_;
};

TEST_P(Rows, PullMovesOneRowOfEachTensor) {
  Link();
  ASSERT_EQ(Pull(2, 0), LLM_SUCCESS) << GetLastErrorText();
  for (size_t tensor = 0; tensor < 10; ++tensor) {
    Copy(theirs_bytes_, mine_bytes_, tensor, 2, tensor, 0);
  }
  ExpectBytes();
  ASSERT_EQ(Pull(1, 3, 16), LLM_SUCCESS) << GetLastErrorText();
  for (size_t tensor = 0; tensor < 10; ++tensor) {
    Copy(theirs_bytes_, mine_bytes_, tensor, 1, tensor, 3, 16);
  }
  ExpectBytes();
}

TEST_P(Rows, PullHonoursLayerRanges) {
  Link();
  ASSERT_EQ(Pull(3, 1, -1, Layers(1, 2, 0, 1)), LLM_SUCCESS) << GetLastErrorText();
  for (size_t tensor = 0; tensor < 4; ++tensor) {
    Copy(theirs_bytes_, mine_bytes_, tensor + 2, 3, tensor, 1);
  }
  ExpectBytes();
  ASSERT_EQ(Pull(0, 2, -1, Layers(1, 2, 8, 9, 1)), LLM_SUCCESS) << GetLastErrorText();
  for (size_t tensor = 0; tensor < 2; ++tensor) {
    Copy(theirs_bytes_, mine_bytes_, tensor + 1, 0, tensor + 8, 2);
  }
  ExpectBytes();
  EXPECT_EQ(Pull(0, 0, -1, Layers(0, 0, -1, -1)), LLM_PARAM_INVALID) << "a range on one side does not say which layers";
  ExpectBytes();
}

TEST_P(Rows, PushMovesOneRowOfEachTensor) {
  Link();
  ASSERT_EQ(Push(1, 3), LLM_SUCCESS) << GetLastErrorText();
  for (size_t tensor = 0; tensor < 10; ++tensor) {
    Copy(mine_bytes_, theirs_bytes_, tensor, 1, tensor, 3);
  }
  ExpectBytes();
  ASSERT_EQ(Push(0, 2, -1, Layers(0, 1, 3, 4)), LLM_SUCCESS) << GetLastErrorText();
  for (size_t tensor = 0; tensor < 4; ++tensor) {
    Copy(mine_bytes_, theirs_bytes_, tensor, 0, tensor + 6, 2);
  }
  ExpectBytes();
}

TEST_P(Rows, AFailedPushLeavesTheLayersBeforeIt) {
  Link();
  const int64_t narrow = b_.AddCache(Shape{4, 4, 64}, 5);
  Bytes expected = b_.Contents(narrow);
  EXPECT_EQ(Push(0, 0, -1, {}, kB, mine_, narrow), LLM_PARAM_INVALID);
  EXPECT_THAT(GetLastErrorText(), HasSubstr("layer 2"));
  for (size_t tensor = 0; tensor < 4; ++tensor) {
    Copy(mine_bytes_, expected, tensor, 0, tensor, 0);
  }
  EXPECT_EQ(b_.Contents(narrow), expected);
}

TEST_P(Rows, PullRefusals) {
  Link();
  EXPECT_EQ(Pull(0, 0, 0), LLM_PARAM_INVALID);
  EXPECT_EQ(Pull(0, 0, -2), LLM_PARAM_INVALID);
  EXPECT_THAT(GetLastErrorText(), HasSubstr("size -2"));
  EXPECT_EQ(Pull(0, 0, 65), LLM_PARAM_INVALID);
  EXPECT_EQ(Pull(0, 4), LLM_PARAM_INVALID);
  EXPECT_THAT(GetLastErrorText(), HasSubstr("destination batch_index 4: the cache has rows 0..3"));
  EXPECT_EQ(Pull(4, 0), LLM_PARAM_INVALID);
  EXPECT_THAT(GetLastErrorText(), HasSubstr("source batch_index 4: the cache has rows 0..3"));
  EXPECT_EQ(Pull(UINT32_MAX, 0), LLM_PARAM_INVALID);
  for (const uint8_t per_layer : {uint8_t{0}, uint8_t{3}, uint8_t{7}, uint8_t{17}}) {
    EXPECT_EQ(Pull(0, 0, -1, Layers(0, 1, 0, 1, per_layer)), LLM_PARAM_INVALID) << int{per_layer};
  }
  EXPECT_EQ(Pull(0, 0, -1, Layers(4, 5, 0, 1)), LLM_PARAM_INVALID) << "beyond the remote layers";
  EXPECT_EQ(Pull(0, 0, -1, {}, kA), LLM_PARAM_INVALID) << "our own id";
  EXPECT_EQ(Pull(0, 0, -1, {}, kB, kNoCache), LLM_KV_CACHE_NOT_EXIST);
  EXPECT_EQ(Pull(0, 0, -1, {}, kB, 0), LLM_KV_CACHE_NOT_EXIST) << "no cache has the key of request 0";
  const int64_t wide = b_.AddCache(Shape{10, 4, 128}, 3);
  EXPECT_EQ(Pull(0, 0, -1, {}, kB, wide), LLM_PARAM_INVALID);
  EXPECT_EQ(Push(0, 0, -1, {}, kB, mine_, wide), LLM_PARAM_INVALID);
  EXPECT_THAT(GetLastErrorText(), HasSubstr("row size differs: 64 bytes in the source cache, 128"));
  EXPECT_TRUE(a_.Alive(kB)) << "a wrong argument costs no link";
  ExpectBytes();
}

TEST_P(Rows, PushRefusals) {
  Link();
  EXPECT_EQ(Push(0, 0, 64), LLM_PARAM_INVALID) << "a push moves whole rows";
  EXPECT_EQ(Push(4, 0), LLM_PARAM_INVALID);
  EXPECT_EQ(Push(0, 4), LLM_PARAM_INVALID);
  EXPECT_EQ(Push(0, 0, -1, Layers(0, 0, -1, -1)), LLM_PARAM_INVALID);
  EXPECT_EQ(Push(0, 0, -1, Layers(5, 5, 5, 5)), LLM_PARAM_INVALID);
  Cache host = a_.Handle(mine_);
  host.cache_desc.placement = CachePlacement::kHost;
  EXPECT_EQ(a_.datadist().PushKvCache(host, {kB, theirs_, 0, {}}), LLM_PARAM_INVALID);
  ExpectBytes();
}

TEST_P(Rows, ErrorPrecedence) {
  EXPECT_EQ(Pull(0, 0, 0, {}, kStranger, kNoCache, kNoCache), LLM_PARAM_INVALID) << "size before the local cache";
  EXPECT_EQ(Pull(0, 0, -1, {}, kStranger, kNoCache, kNoCache), LLM_KV_CACHE_NOT_EXIST) << "local cache before link";
  EXPECT_EQ(Pull(0, 4, -1, {}, kStranger), LLM_PARAM_INVALID) << "local row before the link";
  EXPECT_EQ(Pull(4, 0, -1, {}, kStranger, kNoCache), LLM_NOT_YET_LINK) << "link before the remote cache";
  EXPECT_EQ(Push(0, 0, -1, {}, kStranger, kNoCache), LLM_KV_CACHE_NOT_EXIST) << "local cache before the link";
  EXPECT_EQ(Push(4, 0, -1, {}, kStranger), LLM_NOT_YET_LINK) << "link before the local row";
  Link();
  EXPECT_EQ(Pull(4, 0, -1, {}, kB, kNoCache), LLM_KV_CACHE_NOT_EXIST) << "remote cache before its row";
  EXPECT_EQ(Push(4, 0, -1, {}, kB, mine_, kNoCache), LLM_KV_CACHE_NOT_EXIST) << "remote cache before the local row";
}

INSTANTIATE_TEST_SUITE_P(Transports, Rows, ::testing::Values("local", "cma", "tcp"));

}  // namespace
}  // namespace datadist::testing
