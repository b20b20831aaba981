// From a call's arguments to tensors and runs: the worked examples of the API and every refusal.
#include "transfer/plan.h"

#include <gtest/gtest.h>

#include <string>

namespace datadist {
namespace {

using llm_datadist::KvCacheExtParam;
using llm_datadist::LLM_PARAM_INVALID;

CacheGeometry Geometry(uint32_t num_tensors, uint64_t num_blocks = 4, uint64_t stride = 64) {
  CacheGeometry geometry;
  geometry.num_tensors = num_tensors;
  geometry.num_blocks = num_blocks;
  geometry.stride = stride;
  geometry.tensor_bytes = num_blocks * stride;
  return geometry;
}

KvCacheExtParam Ext(std::pair<int32_t, int32_t> src, std::pair<int32_t, int32_t> dst, uint8_t per_layer = 2) {
  return {src, dst, per_layer, {}};
}

void ExpectInvalid(const Status &status, const std::string &text) {
  EXPECT_EQ(status.code(), LLM_PARAM_INVALID);
  EXPECT_NE(status.text().find(text), std::string::npos) << status.text();
}

void ExpectRuns(const std::vector<Run> &runs, const std::vector<Run> &expected) {
  ASSERT_EQ(runs.size(), expected.size());
  for (size_t i = 0; i < runs.size(); ++i) {
    EXPECT_EQ(runs[i].remote_offset, expected[i].remote_offset) << i;
    EXPECT_EQ(runs[i].local_offset, expected[i].local_offset) << i;
    EXPECT_EQ(runs[i].length, expected[i].length) << i;
  }
}

// ---- arguments ----

TEST(ExtParam, Ranges) {
  EXPECT_TRUE(CheckExtParam({}).ok());
  EXPECT_TRUE(CheckExtParam(Ext({0, 0}, {-1, -1})).ok());
  EXPECT_TRUE(CheckExtParam(Ext({-1, 3}, {5, 7}, 255)).ok());
  ExpectInvalid(CheckExtParam(Ext({-2, 1}, {0, 0})), "src_layer_range {-2, 1}");
  ExpectInvalid(CheckExtParam(Ext({0, 0}, {0, -2})), "dst_layer_range {0, -2}");
  ExpectInvalid(CheckExtParam(Ext({0, -1}, {0, 0})), "src_layer_range {0, -1}");
  ExpectInvalid(CheckExtParam(Ext({0, 0}, {3, 2})), "dst_layer_range {3, 2}");
  ExpectInvalid(CheckExtParam(Ext({0, 0}, {0, 0}, 0)), "tensor_num_per_layer 0");
}

TEST(ExtParam, EqualLengths) {
  EXPECT_TRUE(CheckEqualLayerCounts(Ext({0, 1}, {3, 4})).ok());
  EXPECT_TRUE(CheckEqualLayerCounts(Ext({0, 0}, {-1, -1})).ok());
  EXPECT_TRUE(CheckEqualLayerCounts(Ext({-1, INT32_MAX}, {-1, INT32_MAX})).ok());
  ExpectInvalid(CheckEqualLayerCounts(Ext({0, 1}, {0, 0})), "differ in length");
}

TEST(Blocks, Lists) {
  EXPECT_TRUE(CheckBlockLists({1}, {2}).ok());
  ExpectInvalid(CheckBlockLists({}, {}), "src_blocks is empty");
  ExpectInvalid(CheckBlockLists({1, 2}, {1}), "2 entries, dst_blocks 1");
}

TEST(Blocks, Indices) {
  EXPECT_TRUE(CheckBlockIndices("dst_blocks", {0, 3, 3}, Geometry(1)).ok());
  ExpectInvalid(CheckBlockIndices("dst_blocks", {0, 4}, Geometry(1)), "dst_blocks[1] = 4: the cache has blocks 0..3");
  ExpectInvalid(CheckBlockIndices("src_blocks", {~uint64_t{0}}, Geometry(1)), "src_blocks[0]");
}

TEST(Blocks, StridesMustAgree) {
  EXPECT_TRUE(CheckEqualStrides(Geometry(1), Geometry(2, 9)).ok());
  ExpectInvalid(CheckEqualStrides(Geometry(1), Geometry(1, 4, 128)), "64 bytes in the local cache, 128");
}

TEST(Blocks, RunsGrowOnlyWhereBothListsAscend) {
  ExpectRuns(BuildBlockRuns({0, 1, 3}, {2, 3, 0}, 64), {{0, 128, 128}, {192, 0, 64}});
  ExpectRuns(BuildBlockRuns({1, 0}, {1, 0}, 64), {{64, 64, 64}, {0, 0, 64}});
  ExpectRuns(BuildBlockRuns({0, 0}, {1, 2}, 64), {{0, 64, 64}, {0, 128, 64}});
  ExpectRuns(BuildBlockRuns({0, 1}, {1, 1}, 64), {{0, 64, 64}, {64, 64, 64}});
  ExpectRuns(BuildBlockRuns({0, 1, 2, 3}, {0, 1, 2, 3}, 64), {{0, 0, 256}});
}

// ---- pull ----

TEST(PullTensors, AllUnlessBothRangesAreGiven) {
  for (const KvCacheExtParam &ext : {KvCacheExtParam{}, Ext({0, 0}, {-1, -1}), Ext({-1, -1}, {1, 2}, 7)}) {
    const auto selection = SelectPullTensors(ext, Geometry(10));
    ASSERT_TRUE(selection.ok());
    EXPECT_TRUE(selection.value().all_tensors);
    EXPECT_EQ(selection.value().tensors.count, 10U);
    EXPECT_TRUE(CheckPullSource(selection.value(), Geometry(10), Geometry(10)).ok());
    ExpectInvalid(CheckPullSource(selection.value(), Geometry(10), Geometry(12)), "12 tensors, the local cache 10");
    ExpectInvalid(CheckPullSource(selection.value(), Geometry(10), Geometry(8)), "8 tensors, the local cache 10");
  }
}

TEST(PullTensors, RangesArePairedInOrder) {
  const auto two = SelectPullTensors(Ext({1, 2}, {0, 1}), Geometry(10));
  ASSERT_TRUE(two.ok());
  EXPECT_EQ(two.value().tensors.src_first, 2U);
  EXPECT_EQ(two.value().tensors.dst_first, 0U);
  EXPECT_EQ(two.value().tensors.count, 4U);
  const auto one = SelectPullTensors(Ext({1, 2}, {0, 1}, 1), Geometry(10));
  ASSERT_TRUE(one.ok());
  EXPECT_EQ(one.value().tensors.src_first, 1U);
  EXPECT_EQ(one.value().tensors.count, 2U);
  EXPECT_TRUE(CheckPullSource(two.value(), Geometry(10), Geometry(6)).ok()) << "tensor counts may differ with ranges";
  ExpectInvalid(CheckPullSource(two.value(), Geometry(10), Geometry(5)), "tensors 2..5, the remote cache has 5");
  ExpectInvalid(CheckPullSource(two.value(), Geometry(10), Geometry(10, 4, 32)), "block size differs");
}

TEST(PullTensors, Refusals) {
  for (const uint8_t per_layer : {uint8_t{3}, uint8_t{7}, uint8_t{17}}) {
    ExpectInvalid(SelectPullTensors(Ext({0, 1}, {0, 1}, per_layer), Geometry(10)).status(), "does not divide");
  }
  ExpectInvalid(SelectPullTensors(Ext({0, 1}, {4, 5}), Geometry(10)).status(), "dst_layer_range {4, 5}");
  ExpectInvalid(SelectPullTensors(Ext({0, 0}, {0, 1}), Geometry(10)).status(), "differ in length");
  ExpectInvalid(SelectPullTensors(Ext({INT32_MAX, INT32_MAX}, {0, 0}), Geometry(10)).status(), "every cache");
  ExpectInvalid(SelectPullTensors(Ext({0, INT32_MAX}, {0, INT32_MAX}), Geometry(10)).status(), "dst_layer_range");
}

// ---- push ----

TEST(PushLayers, AllLayersOfTheCallersCount) {
  const auto count_of = [](uint32_t num_tensors, uint8_t per_layer) {
    return SelectPushLayers(Ext({-1, -1}, {-1, -1}, per_layer), num_tensors).value().count;
  };
  EXPECT_EQ(count_of(10, 2), 5);
  EXPECT_EQ(count_of(10, 1), 10);
  EXPECT_EQ(count_of(10, 3), 4) << "the incomplete layer is there to be refused";
  EXPECT_EQ(count_of(10, 17), 1);
  EXPECT_EQ(count_of(UINT32_MAX, 255), 16843009);
  ExpectInvalid(SelectPushLayers({}, 0).status(), "cache_desc.num_tensors");
  const auto ignored = SelectPushLayers(Ext({-1, -1}, {3, 3}), 4);
  ASSERT_TRUE(ignored.ok());
  EXPECT_EQ(ignored.value().dst_first, 0) << "without a source range the destination range is ignored";
}

TEST(PushLayers, EachLayerIsCheckedOnBothSides) {
  const auto layers = SelectPushLayers(Ext({1, 2}, {3, 4}), 0);
  ASSERT_TRUE(layers.ok());
  ASSERT_EQ(layers.value().count, 2);
  ASSERT_TRUE(CheckPushDestination(layers.value(), 1, 2, Geometry(10)).ok());
  const auto pairing = SelectPushTensors(layers.value(), 1, 2, Geometry(6));
  ASSERT_TRUE(pairing.ok());
  EXPECT_EQ(pairing.value().src_first, 4U);
  EXPECT_EQ(pairing.value().dst_first, 8U);
  EXPECT_EQ(pairing.value().count, 2U);
  ExpectInvalid(CheckPushDestination(layers.value(), 1, 2, Geometry(9)), "dst layer 4");
  ExpectInvalid(SelectPushTensors(layers.value(), 1, 2, Geometry(5)).status(), "src layer 2");
}

TEST(PushLayers, Refusals) {
  const auto no_destination = SelectPushLayers(Ext({0, 0}, {-1, -1}), 0);
  ASSERT_TRUE(no_destination.ok()) << "told only after link and remote cache were looked up";
  ExpectInvalid(CheckPushDestination(no_destination.value(), 0, 2, Geometry(10)), "dst layer -1");
  const auto beyond = SelectPushLayers(Ext({4, 5}, {4, 5}), 0);
  EXPECT_TRUE(CheckPushDestination(beyond.value(), 0, 2, Geometry(10)).ok());
  ExpectInvalid(CheckPushDestination(beyond.value(), 1, 2, Geometry(10)), "dst layer 5");
  const auto uneven = SelectPushLayers(Ext({-1, -1}, {-1, -1}, 3), 10);
  ExpectInvalid(SelectPushTensors(uneven.value(), 0, 3, Geometry(10)).status(), "does not divide");
  const auto too_wide = SelectPushLayers(Ext({-1, -1}, {-1, -1}, 17), 10);
  ExpectInvalid(CheckPushDestination(too_wide.value(), 0, 17, Geometry(10)), "dst layer 0");
  const auto huge = SelectPushLayers(Ext({INT32_MAX, INT32_MAX}, {INT32_MAX, INT32_MAX}, 255), 1);
  ExpectInvalid(CheckPushDestination(huge.value(), 0, 255, Geometry(10)), "dst layer 2147483647");
}

}  // namespace
}  // namespace datadist
