// From a call's layers to tensors: the worked examples of the API and every refusal.
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

// ---- arguments ----

TEST(ExtParam, Ranges) {
  EXPECT_TRUE(CheckExtParam({}).ok());
  EXPECT_TRUE(CheckExtParam(Ext({-1, -1}, {-1, -1}, 255)).ok());
  EXPECT_TRUE(CheckExtParam(Ext({0, 3}, {4, 7}, 255)).ok());
  ExpectInvalid(CheckExtParam(Ext({-2, 1}, {0, 0})), "src_layer_range {-2, 1}");
  ExpectInvalid(CheckExtParam(Ext({0, 0}, {0, -2})), "dst_layer_range {0, -2}");
  ExpectInvalid(CheckExtParam(Ext({0, -1}, {0, 0})), "src_layer_range {0, -1}");
  ExpectInvalid(CheckExtParam(Ext({0, 0}, {3, 2})), "dst_layer_range {3, 2}");
  ExpectInvalid(CheckExtParam(Ext({0, 0}, {0, 0}, 0)), "tensor_num_per_layer 0");
}

TEST(ExtParam, OneRangeAloneIsRefused) {
  ExpectInvalid(CheckExtParam(Ext({-1, -1}, {0, 0})), "src_layer_range {-1, -1} and dst_layer_range {0, 0}: allowed");
  ExpectInvalid(CheckExtParam(Ext({1, 1}, {-1, -1})), "src_layer_range {1, 1} and dst_layer_range {-1, -1}: allowed");
  ExpectInvalid(CheckExtParam(Ext({-1, 0}, {-1, 0})), "src_layer_range {-1, 0}");
  ExpectInvalid(CheckExtParam(Ext({-1, -1}, {-1, 0})), "dst_layer_range {-1, 0}");
}

TEST(ExtParam, EqualLengths) {
  EXPECT_TRUE(CheckEqualLayerCounts(Ext({0, 1}, {3, 4})).ok());
  EXPECT_TRUE(CheckEqualLayerCounts(Ext({-1, -1}, {-1, -1})).ok());
  EXPECT_TRUE(CheckEqualLayerCounts(Ext({0, INT32_MAX}, {0, INT32_MAX})).ok());
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

TEST(Blocks, ContiguousCachesHaveNone) {
  CacheGeometry contiguous = Geometry(1);
  contiguous.layout = CacheLayout::kContiguous;
  contiguous.num_blocks = 0;
  ExpectInvalid(CheckBlockIndices("src_blocks", {0}, contiguous), "src_blocks: the cache is contiguous");
}

// ---- pull ----

Result<PullSelection> Select(const KvCacheExtParam &ext, const CacheGeometry &local) {
  return SelectPullTensors(ChooseLayers(ext), local);
}

TEST(PullTensors, AllUnlessRangesAreGiven) {
  for (const KvCacheExtParam &ext : {KvCacheExtParam{}, Ext({-1, -1}, {-1, -1}, 7)}) {
    const auto selection = Select(ext, Geometry(10));
    ASSERT_TRUE(selection.ok());
    EXPECT_TRUE(selection.value().whole_source);
    EXPECT_EQ(selection.value().tensors.count, 10U);
    EXPECT_TRUE(CheckPullSource(selection.value(), Geometry(10)).ok());
    ExpectInvalid(CheckPullSource(selection.value(), Geometry(12)), "12 tensors, the destination 10");
    ExpectInvalid(CheckPullSource(selection.value(), Geometry(8)), "8 tensors, the destination 10");
  }
}

TEST(PullTensors, RangesArePairedInOrder) {
  const auto two = Select(Ext({1, 2}, {0, 1}), Geometry(10));
  ASSERT_TRUE(two.ok());
  EXPECT_EQ(two.value().tensors.src_first, 2U);
  EXPECT_EQ(two.value().tensors.dst_first, 0U);
  EXPECT_EQ(two.value().tensors.count, 4U);
  const auto one = Select(Ext({1, 2}, {0, 1}, 1), Geometry(10));
  ASSERT_TRUE(one.ok());
  EXPECT_EQ(one.value().tensors.src_first, 1U);
  EXPECT_EQ(one.value().tensors.count, 2U);
  EXPECT_TRUE(CheckPullSource(two.value(), Geometry(6)).ok()) << "tensor counts may differ with ranges";
  ExpectInvalid(CheckPullSource(two.value(), Geometry(5)), "tensors 2..5, the remote cache has 5");
}

TEST(PullTensors, OneRangeAlone) {
  const auto from = SelectPullTensors({LayerSpan{1, 5}, std::nullopt, 2}, Geometry(10));
  ASSERT_TRUE(from.ok()) << from.status().text();
  EXPECT_EQ(from.value().tensors.src_first, 2U);
  EXPECT_EQ(from.value().tensors.count, 10U);
  EXPECT_FALSE(from.value().whole_source);
  ExpectInvalid(SelectPullTensors({LayerSpan{1, 2}, std::nullopt, 2}, Geometry(10)).status(),
                "selects 4 tensors, the destination 10");
  const auto to = SelectPullTensors({std::nullopt, LayerSpan{1, 2}, 2}, Geometry(10));
  ASSERT_TRUE(to.ok());
  EXPECT_EQ(to.value().tensors.dst_first, 2U);
  EXPECT_TRUE(CheckPullSource(to.value(), Geometry(4)).ok());
  ExpectInvalid(CheckPullSource(to.value(), Geometry(10)), "10 tensors, the destination 4");
}

TEST(PullTensors, Refusals) {
  for (const uint8_t per_layer : {uint8_t{3}, uint8_t{7}, uint8_t{17}}) {
    ExpectInvalid(Select(Ext({0, 1}, {0, 1}, per_layer), Geometry(10)).status(), "does not divide");
  }
  ExpectInvalid(Select(Ext({0, 1}, {4, 5}), Geometry(10)).status(), "dst_layer_range 4..5");
  ExpectInvalid(Select(Ext({0, 0}, {0, 1}), Geometry(10)).status(), "selects 2 tensors, the destination 4");
  ExpectInvalid(Select(Ext({INT32_MAX, INT32_MAX}, {0, 0}), Geometry(10)).status(), "every cache");
  ExpectInvalid(Select(Ext({0, INT32_MAX}, {0, INT32_MAX}), Geometry(10)).status(), "dst_layer_range");
  for (const LayerSpan &span : {LayerSpan{-1, 1}, LayerSpan{0, 0}, LayerSpan{0, -1}, LayerSpan{INT64_MAX / 2, 4}}) {
    ExpectInvalid(SelectPullTensors({std::nullopt, span, 2}, Geometry(10)).status(), "dst_layer_range");
    ExpectInvalid(SelectPullTensors({span, std::nullopt, 2}, Geometry(10)).status(), "src_layer_range");
  }
  ExpectInvalid(SelectPullTensors({LayerSpan{0, 1}, LayerSpan{0, 1}, 0}, Geometry(10)).status(),
                "tensor_num_per_layer 0");
}

// ---- push ----

// However many tensors a layer has, all are pushed: each layer is a transfer, or each tensor where layers are uneven.
TEST(PushLayers, AllTensorsWithoutRanges) {
  const auto layers_of = [](uint32_t num_tensors, uint8_t per_layer) {
    const auto layers = SelectPushLayers(Ext({-1, -1}, {-1, -1}, per_layer), num_tensors);
    EXPECT_EQ(layers.src_first, 0);
    EXPECT_EQ(layers.dst_first, 0);
    return std::pair(layers.count, layers.tensors_per_layer);
  };
  EXPECT_EQ(layers_of(10, 2), std::pair(int64_t{5}, 2U));
  EXPECT_EQ(layers_of(10, 1), std::pair(int64_t{10}, 1U));
  EXPECT_EQ(layers_of(10, 3), std::pair(int64_t{10}, 1U));
  EXPECT_EQ(layers_of(1, 2), std::pair(int64_t{1}, 1U));
  EXPECT_EQ(layers_of(UINT32_MAX, 255), std::pair(int64_t{16843009}, 255U));
}

TEST(PushLayers, EachLayerIsCheckedOnBothSides) {
  const auto layers = SelectPushLayers(Ext({1, 2}, {3, 4}), 0);
  EXPECT_EQ(layers.src_first, 1);
  EXPECT_EQ(layers.dst_first, 3);
  EXPECT_EQ(layers.tensors_per_layer, 2U);
  ASSERT_EQ(layers.count, 2);
  EXPECT_TRUE(CheckPushDestination(4, 2, Geometry(10)).ok());
  EXPECT_TRUE(CheckPushSource(2, 2, Geometry(6)).ok());
  ExpectInvalid(CheckPushDestination(4, 2, Geometry(9)), "dst layer 4");
  ExpectInvalid(CheckPushSource(2, 2, Geometry(5)), "src layer 2");
}

TEST(PushLayers, Refusals) {
  ExpectInvalid(CheckPushDestination(-1, 2, Geometry(10)), "dst layer -1");
  ExpectInvalid(CheckPushDestination(5, 2, Geometry(10)), "dst layer 5");
  ExpectInvalid(CheckPushSource(0, 3, Geometry(10)), "does not divide");
  ExpectInvalid(CheckPushSource(-1, 2, Geometry(10)), "src layer -1");
  ExpectInvalid(CheckPushDestination(0, 17, Geometry(10)), "dst layer 0");
  ExpectInvalid(CheckPushDestination(0, 0, Geometry(10)), "tensor_num_per_layer 0");
  ExpectInvalid(CheckPushDestination(INT32_MAX, 255, Geometry(10)), "dst layer 2147483647");
}

}  // namespace
}  // namespace datadist
