// Frames and messages: what was written is read back; whatever else arrives is refused, and costs no memory.
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <algorithm>
#include <iterator>
#include <random>
#include <set>
#include <vector>

#include "base/crc32c.h"
#include "control/frame.h"
#include "control/messages.h"

namespace datadist {
namespace {

constexpr TypeSet kAll(MessageType::kHello, MessageType::kPing, MessageType::kCacheInfo, MessageType::kReject);

// Feeds bytes one at a time, as the worst network would.
Result<std::optional<Frame>> Feed(FrameReader &reader, const std::vector<uint8_t> &bytes, TypeSet legal = kAll) {
  Result<std::optional<Frame>> result = std::optional<Frame>();
  for (const uint8_t byte : bytes) {
    *reader.next() = byte;
    result = reader.Filled(1, legal);
    if (!result.ok()) {
      break;
    }
  }
  return result;
}

void Patch(std::vector<uint8_t> &bytes, size_t at, std::initializer_list<uint8_t> values) {
  std::copy(values.begin(), values.end(), bytes.begin() + static_cast<std::ptrdiff_t>(at));
}

TEST(Frame, IsReadBack) {
  FrameReader reader;
  for (const size_t size : {size_t{0}, size_t{1}, size_t{4096}}) {
    const std::vector<uint8_t> body(size, 0x5A);
    const auto frame = Feed(reader, EncodeFrame(MessageType::kHello, 42, body));
    ASSERT_TRUE(frame.ok());
    ASSERT_TRUE(frame.value().has_value());
    EXPECT_EQ(frame.value()->type, MessageType::kHello);
    EXPECT_EQ(frame.value()->seq, 42U);
    EXPECT_EQ(frame.value()->body, body);
    EXPECT_TRUE(reader.AtBoundary());
  }
}

// With a key: not a bit of it changed, in its order, no more than once, and for this direction.
TEST(Frame, SealsHoldForOneFrameInItsPlace) {
  ASSERT_TRUE(LoadHmac().ok());
  const Digest key{1};
  FrameSeal sender(key);
  const auto next = [&sender](const std::vector<uint8_t> &body) {
    return EncodeFrame(MessageType::kHello, 1, body, &sender);
  };
  const std::vector<uint8_t> first = next(std::vector<uint8_t>(300, 7));
  const std::vector<uint8_t> second = next({});
  EXPECT_EQ(second.size(), kFrameHeaderSize + kSealSize);

  FrameReader reader{FrameSeal(key)};
  EXPECT_TRUE(Feed(reader, first).value().has_value());
  EXPECT_TRUE(Feed(reader, second).value().has_value());
  EXPECT_FALSE(Feed(reader, second).ok()) << "said twice";
  const std::vector<uint8_t> unsealed = EncodeFrame(MessageType::kHello, 1, {});
  for (const auto &[what, frame] : {std::pair("out of order", second), std::pair("of no key", unsealed)}) {
    FrameReader fresh{FrameSeal(key)};
    const auto read = Feed(fresh, frame);
    EXPECT_FALSE(read.ok() && read.value().has_value()) << what;
  }
  FrameReader other{FrameSeal(Digest{2})};
  EXPECT_FALSE(Feed(other, first).ok()) << "of another key";

  // The header's checksum is anybody's to make: what changes it must fail at the seal.
  FrameSeal forger(key);
  std::vector<uint8_t> forged = EncodeFrame(MessageType::kHello, 1, std::vector<uint8_t>(300, 7), &forger);
  const std::vector<uint8_t> changed = EncodeFrame(MessageType::kHello, 2, std::vector<uint8_t>(300, 8));
  std::copy(changed.begin(), changed.end(), forged.begin());
  FrameReader careful{FrameSeal(key)};
  EXPECT_FALSE(Feed(careful, forged).ok());
}

TEST(Frame, TruncatedIsNeverAFrame) {
  const std::vector<uint8_t> whole = EncodeFrame(MessageType::kHello, 1, std::vector<uint8_t>(30, 7));
  for (size_t size = 0; size < whole.size(); ++size) {
    FrameReader reader;
    const auto frame = Feed(reader, {whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size)});
    ASSERT_TRUE(frame.ok());
    EXPECT_FALSE(frame.value().has_value());
  }
}

TEST(Frame, EveryFlippedBitIsNoticed) {
  const std::vector<uint8_t> good = EncodeFrame(MessageType::kHello, 1, std::vector<uint8_t>(8, 7));
  for (size_t bit = 0; bit < good.size() * 8; ++bit) {
    std::vector<uint8_t> bad = good;
    bad[bit / 8] = static_cast<uint8_t>(bad[bit / 8] ^ (1U << (bit % 8)));
    FrameReader reader;
    const auto frame = Feed(reader, bad);
    EXPECT_FALSE(frame.ok() && frame.value().has_value()) << "bit " << bit;
  }
}

TEST(Frame, HeaderIsRefusedBeforeTheBodyIsAllocated) {
  struct Case {
    const char *what;
    size_t at;
    std::initializer_list<uint8_t> values;
  };
  for (const Case &bad : {Case{"magic", 0, {1, 2, 3, 4}}, Case{"version", 4, {kProtocolVersion + 1, 0}}, Case{"type 0", 6, {0, 0}},
                          Case{"type 19", 6, {19, 0}}, Case{"type 65535", 6, {255, 255}},
                          Case{"illegal type", 6, {static_cast<uint8_t>(MessageType::kUnlink), 0}},
                          Case{"length", 8, {1, 16, 0, 0}}, Case{"length 2^32-1", 8, {255, 255, 255, 255}}}) {
    std::vector<uint8_t> bytes = EncodeFrame(MessageType::kPing, 1, std::vector<uint8_t>(4096));
    Patch(bytes, bad.at, bad.values);
    bytes.resize(kFrameHeaderSize);
    FrameReader reader;
    EXPECT_FALSE(Feed(reader, bytes).ok()) << bad.what;
  }
}

TEST(Frame, HelloOfAnotherVersionIsReadSoThatItCanBeAnswered) {
  std::vector<uint8_t> bytes = EncodeFrame(MessageType::kHello, 1, {});
  Patch(bytes, 4, {9, 0});
  Patch(bytes, 16, {0, 0, 0, 0});
  const uint32_t crc = Crc32c(bytes.data(), bytes.size());
  Patch(bytes, 16, {static_cast<uint8_t>(crc), static_cast<uint8_t>(crc >> 8), static_cast<uint8_t>(crc >> 16),
                    static_cast<uint8_t>(crc >> 24)});
  FrameReader reader;
  const auto frame = Feed(reader, bytes);
  ASSERT_TRUE(frame.ok());
  EXPECT_TRUE(frame.value().has_value());
}

TEST(Frame, RandomBytesAreRefused) {
  constexpr uint32_t kSeed = 20;
  std::mt19937 random(kSeed);
  for (int round = 0; round < 20000; ++round) {
    std::vector<uint8_t> bytes = EncodeFrame(MessageType::kCacheInfo, 1, std::vector<uint8_t>(random() % 64));
    for (uint32_t i = 0, flips = 1 + static_cast<uint32_t>(random() % 8); i < flips; ++i) {
      bytes[random() % bytes.size()] = static_cast<uint8_t>(random());
    }
    if (bytes == EncodeFrame(MessageType::kCacheInfo, 1, std::vector<uint8_t>(bytes.size() - kFrameHeaderSize))) {
      continue;
    }
    FrameReader reader;
    const auto frame = Feed(reader, bytes);
    ASSERT_FALSE(frame.ok() && frame.value().has_value()) << "seed " << kSeed << " round " << round;
  }
}

EndpointInfo SomeEndpoint() {
  EndpointInfo info;
  info.cluster_id = ~0ULL - 1;
  info.role = 3;
  info.incarnation.fill(0x11);
  info.transports = {{"tcp", {16, 0}}, {"other_1", Blob(kMaxOfferBlob, 7)}};
  return info;
}

CacheInfo SomeCache(uint32_t tensors, size_t blob_bytes) {
  CacheInfo info;
  RemoteCache &cache = info.target.cache;
  cache.cache_id = 3;
  cache.generation = 9;
  cache.geometry = CacheGeometry{llm_datadist::CachePlacement::kHost, CacheLayout::kMix, tensors, 4, 4, 256, 64};
  cache.blob.assign(blob_bytes, 0x5A);
  info.target.has_row = true;
  info.target.row = 3;
  info.target.offset = 200;
  info.target.lasting = true;
  return info;
}

// Every proper prefix and every extension of a good body must be refused.
template <typename Message>
void ExpectExact(const Message &message) {
  std::vector<uint8_t> body = Encode(message);
  EXPECT_TRUE(Decode<Message>(body).ok());
  for (size_t size = 0; size < body.size(); ++size) {
    EXPECT_FALSE(Decode<Message>({body.begin(), body.begin() + static_cast<std::ptrdiff_t>(size)}).ok()) << size;
  }
  body.push_back(0);
  EXPECT_FALSE(Decode<Message>(body).ok()) << "trailing byte";
}

TEST(Messages, AreExact) {
  ExpectExact(Hello{{1, 2}, SomeEndpoint(), 1234, true, LinkToken{1, 2, 3}, "comm"});
  ExpectExact(Welcome{SomeEndpoint(), {}});
  ExpectExact(Reject{Status(llm_datadist::LLM_ALREADY_LINK, "why")});
  ExpectExact(Ready{"cma", "why"});
  ExpectExact(Attach{{}, Initiator::kServer, 15});
  ExpectExact(DescribeRequest{CacheRef::Id(-5)});
  ExpectExact(DescribeRequest{CacheRef::Key(CacheKey{KeyKind::kPrefix, ~0ULL, 1})});
  ExpectExact(DescribeRequest{CacheRef::Address(~0ULL, ~0ULL)});
  ExpectExact(ConsumeRequest{CacheKey{KeyKind::kBlocks, 0, 7}, 3, 4, 5});
  ExpectExact(Consumed{Status::Ok()});
  ExpectExact(Consumed{Status(llm_datadist::LLM_KV_CACHE_NOT_EXIST, "pulled by another")});
  ExpectExact(SomeCache(2, 2));
  ExpectExact(SomeCache(2, 0));
  ExpectExact(CacheInfo{Status(llm_datadist::LLM_KV_CACHE_NOT_EXIST, "gone"), {}});
  ExpectExact(PushRequest{1, 2, 3, SomeCache(2, 2).target.cache, 1, 1, 6, {{1, 2, 3}, {4, 5, 6}}});
  ExpectExact(Pushed{Status(llm_datadist::LLM_TIMEOUT, "late")});
  ExpectExact(UnlinkRequest{8, {}});
  EXPECT_FALSE(DecodeEmpty({0}).ok());
}

TEST(Messages, ValuesAreReadBack) {
  const Result<Hello> hello = Decode<Hello>(Encode(Hello{{1, 2}, SomeEndpoint(), 1234, true, LinkToken{1, 2, 3}, "comm"}));
  ASSERT_TRUE(hello.ok());
  EXPECT_EQ(hello.value().client.cluster_id, ~0ULL - 1);
  EXPECT_EQ(hello.value().client.incarnation, SomeEndpoint().incarnation);
  EXPECT_EQ(hello.value().replaced, (LinkToken{1, 2, 3}));
  EXPECT_EQ(hello.value().remaining_ms, 1234U);
  EXPECT_TRUE(hello.value().force_link);
  const Result<CacheInfo> cache = Decode<CacheInfo>(Encode(SomeCache(2, 2)));
  ASSERT_TRUE(cache.ok());
  const RemoteTarget &target = cache.value().target;
  EXPECT_EQ(target.cache.geometry.stride, 64U);
  EXPECT_EQ(target.cache.geometry.batch_size, 4U);
  EXPECT_EQ(target.cache.blob, SomeCache(2, 2).target.cache.blob);
  ASSERT_EQ(hello.value().client.transports.size(), 2U);
  EXPECT_EQ(hello.value().client.transports[1].name, "other_1");
  EXPECT_EQ(hello.value().client.transports[1].blob, Blob(kMaxOfferBlob, 7));
  EXPECT_EQ(target.row, 3U);
  EXPECT_EQ(target.offset, 200U);
  EXPECT_TRUE(target.lasting);
  EXPECT_EQ(hello.value().comm_name, "comm");
  const Result<DescribeRequest> by_key =
      Decode<DescribeRequest>(Encode(DescribeRequest{CacheRef::Key(CacheKey{KeyKind::kPrefix, 5, 6})}));
  ASSERT_TRUE(by_key.ok());
  EXPECT_EQ(by_key.value().ref.key, (CacheKey{KeyKind::kPrefix, 5, 6}));
}

// A peer that could choose the code would choose what the caller does next: wait, unlink, believe that it is linked.
TEST(Messages, CodesThatACallCannotEndInAreRefused) {
  using namespace llm_datadist;  // NOLINT(google-build-using-namespace): all the codes
  const std::vector<llm_datadist::Status> all = {
      LLM_FAILED, LLM_WAIT_PROC_TIMEOUT, LLM_KV_CACHE_NOT_EXIST, LLM_PARAM_INVALID, LLM_NOT_YET_LINK, LLM_ALREADY_LINK,
      LLM_LINK_FAILED, LLM_UNLINK_FAILED, LLM_NOTIFY_PROMPT_UNLINK_FAILED, LLM_CLUSTER_NUM_EXCEED_LIMIT,
      LLM_PROCESSING_LINK, LLM_DEVICE_OUT_OF_MEMORY, LLM_EXIST_LINK, LLM_FEATURE_NOT_ENABLED, LLM_TIMEOUT,
      LLM_LINK_BUSY, LLM_OUT_OF_MEMORY, 1U, 0xDEADBEEFU};
  const auto passed = [&](const auto &decodes) {
    std::set<llm_datadist::Status> codes;
    std::copy_if(all.begin(), all.end(), std::inserter(codes, codes.end()),
                 [&](llm_datadist::Status code) { return decodes(datadist::Status(code, "why")); });
    return codes;
  };
  EXPECT_EQ(passed([](const datadist::Status &status) { return Decode<Reject>(Encode(Reject{status})).ok(); }),
            (std::set<llm_datadist::Status>{LLM_ALREADY_LINK, LLM_PROCESSING_LINK, LLM_NOT_YET_LINK, LLM_LINK_FAILED,
                                            LLM_PARAM_INVALID, LLM_FAILED}));
  const std::set<llm_datadist::Status> of_caches = {LLM_KV_CACHE_NOT_EXIST, LLM_PARAM_INVALID};
  EXPECT_EQ(passed([](const datadist::Status &status) {
              CacheInfo info;
              info.status = status;
              return Decode<CacheInfo>(Encode(info)).ok();
            }),
            of_caches);
  EXPECT_EQ(passed([](const datadist::Status &status) { return Decode<Consumed>(Encode(Consumed{status})).ok(); }),
            of_caches);
  EXPECT_EQ(passed([](const datadist::Status &status) { return Decode<Pushed>(Encode(Pushed{status})).ok(); }),
            (std::set<llm_datadist::Status>{LLM_KV_CACHE_NOT_EXIST, LLM_PARAM_INVALID, llm_datadist::LLM_TIMEOUT,
                                            LLM_FAILED}));
}

TEST(Messages, ValuesOutOfRangeAreRefused) {
  EndpointInfo info = SomeEndpoint();
  info.role = 0;
  EXPECT_FALSE(Decode<Welcome>(Encode(Welcome{info, {}})).ok());
  info = SomeEndpoint();
  for (const std::vector<TransportOffer> &offers : std::vector<std::vector<TransportOffer>>{
           {{"tcp", Blob(kMaxOfferBlob + 1)}},
           {{"tcp", {}}, {"cma", {}}, {"tcp", {}}},
           {{"", {}}},
           {{"TCP", {}}},
           {{"tcp\n", {}}},
           std::vector<TransportOffer>(kMaxTransports + 1, {"tcp", {}}),
       }) {
    info.transports = offers;
    EXPECT_FALSE(Decode<Welcome>(Encode(Welcome{info, {}})).ok()) << offers.size() << " " << offers[0].name;
  }
  EXPECT_FALSE(Decode<Reject>(Encode(Reject{Status::Ok()})).ok());
  EXPECT_FALSE(Decode<Attach>(Encode(Attach{{}, Initiator::kServer, 16})).ok());
  for (const std::string name : {"", "tcp\n", "t c p", "\xFF"}) {
    EXPECT_FALSE(Decode<Ready>(Encode(Ready{name, ""})).ok()) << name;
  }
  EXPECT_TRUE(Decode<CacheInfo>(Encode(SomeCache(2, kMaxCacheBlob))).ok());
  EXPECT_FALSE(Decode<CacheInfo>(Encode(SomeCache(2, kMaxCacheBlob + 1))).ok());
  EXPECT_FALSE(Decode<CacheInfo>(Encode(SomeCache(0, 0))).ok());
  const auto refused = [](auto change) {
    CacheInfo changed = SomeCache(2, 2);
    change(changed.target);
    return !Decode<CacheInfo>(Encode(changed)).ok();
  };
  EXPECT_TRUE(refused([](RemoteTarget &target) { target.row = 4; }));
  EXPECT_TRUE(refused([](RemoteTarget &target) { target.tensor = 2; }));
  EXPECT_TRUE(refused([](RemoteTarget &target) { target.offset = 257; }));
  EXPECT_TRUE(refused([](RemoteTarget &target) { target.cache.geometry.layout = static_cast<CacheLayout>(3); }));
  EXPECT_TRUE(refused([](RemoteTarget &target) {
    target.cache.geometry.batch_size = 0;
    target.cache.geometry.num_blocks = 0;
  }));
  EXPECT_FALSE(Decode<ConsumeRequest>(Encode(ConsumeRequest{CacheKey{static_cast<KeyKind>(4), 0, 0}, 0, 0, 0})).ok());
}

TEST(Messages, TheLargestCacheFitsIntoAFrame) {
  EXPECT_LE(Encode(SomeCache(65536, kMaxCacheBlob)).size(), BodyCap(MessageType::kCacheInfo));
}

}  // namespace
}  // namespace datadist
