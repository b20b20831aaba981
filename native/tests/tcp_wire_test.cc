// The tcp wire without sockets: what decodes, what does not, and how an op becomes requests.
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <tuple>

#include "transport/tcp/slices.h"
#include "transport_support/requests.h"

namespace datadist::test {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_PARAM_INVALID;

// ---- decoding ----

TEST(Wire, RequestSurvivesTheRoundTrip) {
  RequestHeader header = GoodHeader({});
  header.op = DataOp::kPush;
  header.cache_id = -5;
  header.generation = 1ULL << 63;
  header.first_tensor = 9;
  header.span_count = 2;
  header.total_bytes = 2 * (3 + 5);
  const auto bytes = Encoded(header, {{1ULL << 60, 3}, {0, 5}});
  ASSERT_EQ(bytes.size(), kRequestHeaderBytes + 2 * kSpanBytes);
  const auto decoded = DecodeRequestHeader(bytes.data());
  ASSERT_TRUE(decoded.ok());
  EXPECT_EQ(decoded.value().op, DataOp::kPush);
  EXPECT_EQ(decoded.value().remaining_ms, header.remaining_ms);
  EXPECT_EQ(decoded.value().cache_id, -5);
  EXPECT_EQ(decoded.value().generation, 1ULL << 63);
  EXPECT_EQ(decoded.value().first_tensor, 9U);
  EXPECT_EQ(decoded.value().tensor_count, 2U);
  const auto spans = DecodeSpans(bytes.data() + kRequestHeaderBytes, decoded.value());
  ASSERT_TRUE(spans.ok());
  EXPECT_EQ(spans.value()[0].offset, 1ULL << 60);
  EXPECT_EQ(spans.value()[1].length, 5U);
}

// The bytes are the protocol: a change here needs a new version.
TEST(Wire, GoldenRequest) {
  RequestHeader header = GoodHeader({});
  header.cache_id = 0x0102;
  header.generation = 3;
  const std::vector<uint8_t> golden = {
      'D', 'D', 'R', 'Q', 1, 0, 1, 0,                   // magic, version, op, reserved
      0x20, 0x4E, 0, 0,                                 // remaining_ms
      2, 1, 0, 0, 0, 0, 0, 0,                           // cache id
      3, 0, 0, 0, 0, 0, 0, 0,                           // generation
      0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0,               // first tensor, tensor count, span count
      128, 0, 0, 0, 0, 0, 0, 0,                         // total bytes
      7, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0, 0, 0, 0, 0, 0,  // span: offset, length
  };
  EXPECT_EQ(Encoded(header, {{7, 64}}), golden);
}

TEST(Wire, EveryBadFieldIsNamed) {
  for (const BadField &bad : kBadFields) {
    SCOPED_TRACE(bad.field);
    const auto bytes = Spoiled(Encoded(GoodHeader({}), {{0, 64}}), bad);
    const auto header = DecodeRequestHeader(bytes.data());
    const Status status =
        header.ok() ? DecodeSpans(bytes.data() + kRequestHeaderBytes, header.value()).status() : header.status();
    EXPECT_EQ(status.code(), LLM_FAILED);
    EXPECT_NE(status.text().find(bad.field), std::string::npos) << status.text();
  }
}

TEST(Wire, RandomFramesDecodeOrFailInBounds) {
  for (uint64_t seed = 1; seed <= 200'000; ++seed) {
    std::mt19937_64 random(seed);
    auto bytes = Encoded(GoodHeader({}), {{0, 64}});
    for (uint64_t flips = 1 + random() % 4; flips > 0; --flips) {
      bytes[random() % bytes.size()] = static_cast<uint8_t>(random());
    }
    const auto header = DecodeRequestHeader(bytes.data());
    if (header.ok() && header.value().span_count == 1) {
      const auto spans = DecodeSpans(bytes.data() + kRequestHeaderBytes, header.value());
      if (spans.ok()) {
        ASSERT_EQ(spans.value()[0].length * header.value().tensor_count, header.value().total_bytes) << "seed " << seed;
      }
    }
    (void)DecodeResponseHeader(bytes.data() + random() % 16);
  }
}

TEST(Wire, ResponseIsChecked) {
  Writer out;
  EncodeResponse(Status(LLM_PARAM_INVALID, std::string(5000, 'x')), 77, out);
  ASSERT_EQ(out.size(), kResponseHeaderBytes + kMaxTextBytes) << "a long text is cut";
  const auto bytes = out.Take();
  const auto header = DecodeResponseHeader(bytes.data());
  ASSERT_TRUE(header.ok());
  EXPECT_EQ(header.value().status, LLM_PARAM_INVALID);
  EXPECT_EQ(header.value().total_bytes, 77U);
  EXPECT_EQ(header.value().text_bytes, kMaxTextBytes);
  for (const BadField &bad : std::vector<BadField>{
           {"magic", 0, {0}}, {"status", 4, {1}}, {"reserved", 16, {1}}, {"text length", 18, {1, 2}}}) {
    const auto decoded = DecodeResponseHeader(Spoiled(bytes, bad).data());
    ASSERT_FALSE(decoded.ok()) << bad.field;
    EXPECT_NE(decoded.status().text().find(bad.field), std::string::npos) << decoded.status().text();
  }
}

// ---- slices ----

TEST(Slices, CoverEveryByteOnceInOrder) {
  for (uint64_t seed = 1; seed <= 500; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 random(seed);
    TransferOp op;
    op.tensor_count = static_cast<uint32_t>(1 + random() % 12);
    uint64_t per_tensor = 0;
    for (uint64_t runs = 1 + random() % 20; runs > 0; --runs) {
      op.runs.push_back({random() % 10'000, random() % 10'000, 1 + random() % 300});
      per_tensor += op.runs.back().length;
    }
    using Byte = std::tuple<uint32_t, uint64_t, uint64_t>;  // tensor, remote offset, local offset
    std::vector<Byte> expected;
    for (uint32_t tensor = 0; tensor < op.tensor_count; ++tensor) {
      for (const datadist::Run &run : op.runs) {
        for (uint64_t i = 0; i < run.length; ++i) {
          expected.emplace_back(tensor, run.remote_offset + i, run.local_offset + i);
        }
      }
    }
    std::vector<Byte> got;
    const size_t parts = 1 + random() % 5;
    for (size_t part = 0; part < parts; ++part) {
      for (const OpSlice &slice : SliceOp(op, PartOf(per_tensor, op.tensor_count, part, parts), false)) {
        uint64_t total = 0;
        for (uint32_t tensor = 0; tensor < slice.tensor_count; ++tensor) {
          for (size_t i = 0; i < slice.remote.size(); ++i) {
            ASSERT_EQ(slice.remote[i].length, slice.local[i].length);
            total += slice.remote[i].length;
            for (uint64_t byte = 0; byte < slice.remote[i].length; ++byte) {
              got.emplace_back(slice.first_tensor + tensor, slice.remote[i].offset + byte,
                               slice.local[i].offset + byte);
            }
          }
        }
        ASSERT_EQ(total, slice.total_bytes);
      }
    }
    ASSERT_EQ(got, expected);
  }
}

TEST(Slices, NoRequestHasMoreSpansThanAllowed) {
  TransferOp op;
  op.tensor_count = 3;
  op.runs.assign(2 * kMaxSpansPerRequest + 5, datadist::Run{0, 0, 1});
  const auto slices = SliceOp(op, {0, op.runs.size() * 3}, false);
  ASSERT_EQ(slices.size(), 3U);
  EXPECT_EQ(slices[0].remote.size(), kMaxSpansPerRequest);
  EXPECT_EQ(slices[2].remote.size(), 5U);
  EXPECT_EQ(slices[2].tensor_count, 3U);
  const auto ordered = SliceOp(op, {0, op.runs.size() * 3}, true);
  ASSERT_EQ(ordered.size(), 9U);
  for (size_t i = 0; i < ordered.size(); ++i) {
    EXPECT_EQ(ordered[i].first_tensor, i / 3);
    EXPECT_EQ(ordered[i].tensor_count, 1U);
  }
}

}  // namespace
}  // namespace datadist::test
