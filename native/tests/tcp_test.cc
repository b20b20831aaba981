// Both ends of a data connection against raw sockets: frames that do not decode, peers that stall or answer nonsense.
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <algorithm>
#include <string>
#include <thread>

#include "base/socket_io.h"
#include "transport/tcp/tcp_data_path.h"
#include "transport_support/initiator.h"
#include "transport_support/requests.h"

namespace datadist::test {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_KV_CACHE_NOT_EXIST;
using llm_datadist::LLM_PARAM_INVALID;
using std::chrono::milliseconds;
using std::chrono::seconds;

const CacheShape kShape{2, 4, 64};

Deadline Soon() { return Deadline::In(seconds(30)); }

// ---- the owner's end against raw bytes ----

class TcpOwner : public testing::Test {
 protected:
  Fd Connect(milliseconds max_request = seconds(30)) {
    Fd stream = Dial(port_);
    owner_.Serve(1, max_request);
    return stream;
  }
  static bool EndsWithoutAnswer(const Fd &stream) {
    char byte = 0;
    return RecvAll(stream.get(), &byte, 1, Soon()).code() == LLM_FAILED;
  }
  Status Send(const Fd &stream, const std::vector<uint8_t> &bytes) {
    return SendAll(stream.get(), bytes.data(), bytes.size(), Soon());
  }
  Result<ResponseHeader> Response(const Fd &stream) {
    uint8_t bytes[kResponseHeaderBytes];
    const Status status = RecvAll(stream.get(), bytes, sizeof(bytes), Soon());
    if (!status.ok()) {
      return status;
    }
    auto header = DecodeResponseHeader(bytes);
    std::string text(header.ok() ? header.value().text_bytes : 0, '\0');
    EXPECT_TRUE(RecvAll(stream.get(), text.data(), text.size(), Soon()).ok());
    return header;
  }

  OwnerHere owner_;
  RemoteCache remote_ = owner_.AddCache(kShape, 1);
  uint16_t port_ = owner_.Listen();
};

TEST_F(TcpOwner, MalformedFramesEndTheConnectionOnly) {
  for (const BadField &bad : kBadFields) {
    SCOPED_TRACE(bad.field);
    const Fd stream = Connect();
    (void)Send(stream, Spoiled(Encoded(GoodHeader(remote_), {{0, 64}}), bad));
    EXPECT_TRUE(EndsWithoutAnswer(stream));
  }
  const Fd stream = Connect();
  ASSERT_TRUE(Send(stream, Encoded(GoodHeader(remote_), {{0, 64}})).ok());
  EXPECT_TRUE(Response(stream).ok());
}

TEST_F(TcpOwner, RequestsCutAtEveryByteEndTheConnectionOnly) {
  const auto bytes = Encoded(GoodHeader(remote_), {{0, 64}});
  for (size_t size = 0; size < bytes.size(); ++size) {
    const Fd stream = Connect();
    ASSERT_TRUE(Send(stream, {bytes.begin(), bytes.begin() + static_cast<long>(size)}).ok());
    ::shutdown(stream.get(), SHUT_WR);
    EXPECT_TRUE(EndsWithoutAnswer(stream)) << size;
  }
}

TEST_F(TcpOwner, BytesOneByOneMakeTheSameRequest) {
  const Fd stream = Connect();
  for (const uint8_t byte : Encoded(GoodHeader(remote_), {{64, 64}})) {
    ASSERT_TRUE(Send(stream, {byte}).ok());
  }
  ASSERT_TRUE(Response(stream).ok());
  std::vector<uint8_t> got(2 * 64);
  ASSERT_TRUE(RecvAll(stream.get(), got.data(), got.size(), Soon()).ok());
  const auto pattern = PatternOf(kShape, 1);
  EXPECT_TRUE(std::equal(got.begin(), got.begin() + 64, pattern.begin() + 64));
  EXPECT_TRUE(std::equal(got.begin() + 64, got.end(), pattern.begin() + 256 + 64));
}

// What is well formed but not allowed is refused by word, and the next request is served.
TEST_F(TcpOwner, RefusesWhatIsOutsideTheCache) {
  struct Case {
    llm_datadist::Status code;
    void (*spoil)(RequestHeader &header, Span &span);
  };
  const Case cases[] = {
      {LLM_PARAM_INVALID, [](RequestHeader &, Span &span) { span.offset = 4 * 64 - 63; }},
      {LLM_PARAM_INVALID, [](RequestHeader &, Span &span) { span.offset = ~uint64_t{0}; }},
      {LLM_PARAM_INVALID, [](RequestHeader &header, Span &span) {
         span.length = uint64_t{1} << 62;
         header.total_bytes = uint64_t{1} << 63;
       }},
      {LLM_PARAM_INVALID, [](RequestHeader &header, Span &) { header.first_tensor = 1; }},
      {LLM_PARAM_INVALID, [](RequestHeader &header, Span &) { header.first_tensor = ~0U; }},
      {LLM_PARAM_INVALID, [](RequestHeader &header, Span &) {
         header.tensor_count = ~0U;
         header.total_bytes = 64 * uint64_t{~0U};
       }},
      {LLM_KV_CACHE_NOT_EXIST, [](RequestHeader &header, Span &) { header.cache_id = 99; }},
      {LLM_KV_CACHE_NOT_EXIST, [](RequestHeader &header, Span &) { header.cache_id = -1; }},
      {LLM_KV_CACHE_NOT_EXIST, [](RequestHeader &header, Span &) { ++header.generation; }},
  };
  const Fd stream = Connect();
  for (const DataOp op : {DataOp::kPull, DataOp::kPush}) {
    for (const Case &test : cases) {
      RequestHeader header = GoodHeader(remote_);
      header.op = op;
      Span span{0, 64};
      test.spoil(header, span);
      ASSERT_TRUE(Send(stream, Encoded(header, {span})).ok());
      const auto response = Response(stream);
      ASSERT_TRUE(response.ok());
      EXPECT_EQ(response.value().status, test.code);
    }
  }
  EXPECT_EQ(owner_.Bytes(remote_.cache_id), PatternOf(kShape, 1));
  EXPECT_TRUE(owner_.CanariesIntact(remote_.cache_id));
}

// The header of another engine, {size, address, opcode}, which that engine dereferenced; and requests of our own form with
// addresses of the owner for names.
TEST_F(TcpOwner, Cve2026_103764AddressesAreNoNames) {
  const uint64_t address = Addresses(remote_).tensor(0);
  for (const uint8_t opcode : {uint8_t{0}, uint8_t{1}, uint8_t{2}}) {
    Writer header;
    header.U64(64);
    header.U64(address);
    header.U8(opcode);
    std::vector<uint8_t> bytes = header.Take();
    bytes.resize(kRequestHeaderBytes, 0xEE);
    const Fd stream = Connect();
    ASSERT_TRUE(Send(stream, bytes).ok());
    EXPECT_TRUE(EndsWithoutAnswer(stream));
  }
  const Fd stream = Connect();
  for (const DataOp op : {DataOp::kPull, DataOp::kPush}) {
    for (const bool as_cache : {true, false}) {
      RequestHeader header = GoodHeader(remote_);
      header.op = op;
      header.cache_id = as_cache ? static_cast<int64_t>(address) : header.cache_id;
      ASSERT_TRUE(Send(stream, Encoded(header, {{as_cache ? 0 : address, 64}})).ok());
      const auto response = Response(stream);
      ASSERT_TRUE(response.ok());
      EXPECT_EQ(response.value().status, as_cache ? LLM_KV_CACHE_NOT_EXIST : LLM_PARAM_INVALID);
    }
  }
  EXPECT_EQ(owner_.Bytes(remote_.cache_id), PatternOf(kShape, 1));
  EXPECT_TRUE(owner_.CanariesIntact(remote_.cache_id));
}

// A push that stops half way holds its pin until the request's time is over, and not longer.
TEST_F(TcpOwner, StalledPushIsCutAndLetsGoOfTheCache) {
  for (const bool peer_sets_limit : {true, false}) {
    const RemoteCache cache = owner_.AddCache(kShape, 2);
    constexpr milliseconds kLimit{1000};
    const Fd stream = Connect(peer_sets_limit ? milliseconds(30'000) : kLimit);
    RequestHeader header = GoodHeader(cache);
    header.op = DataOp::kPush;
    header.remaining_ms = peer_sets_limit ? static_cast<uint32_t>(kLimit.count()) : 30'000;
    const auto begin = Deadline::Clock::now();
    ASSERT_TRUE(Send(stream, Encoded(header, {{0, 64}})).ok());
    ASSERT_TRUE(Response(stream).ok());  // the pin is held now
    ASSERT_TRUE(Send(stream, std::vector<uint8_t>(10)).ok());
    owner_.UnregisterAndReuse(cache.cache_id);
    EXPECT_GE(Deadline::Clock::now() - begin, kLimit) << "Unregister must wait for the pin";
    EXPECT_LT(Deadline::Clock::now() - begin, seconds(20));
    EXPECT_TRUE(EndsWithoutAnswer(stream));
  }
}

// Who has every byte of a pull may free the cache and finds its memory free: nothing holds it for a moment longer.
TEST_F(TcpOwner, LetsGoOfACacheBeforeThePullIsComplete) {
  const Fd stream = Connect();
  for (const uint64_t bytes : {64, 8192, 8193, 20'000, 700'000}) {
    const uint64_t rounds = bytes < 100'000 ? 100 : 10;  // of large ones nearly all of a round is spent on the pattern
    for (uint64_t seed = 0; seed < rounds; ++seed) {
      const CacheShape shape{2, 1, bytes};
      const RemoteCache cache = owner_.AddCache(shape, seed);
      RequestHeader header = GoodHeader(cache);
      header.total_bytes = 2 * bytes;
      ASSERT_TRUE(Send(stream, Encoded(header, {{0, bytes}})).ok());
      ASSERT_TRUE(Response(stream).ok());
      std::vector<uint8_t> got(2 * bytes);
      ASSERT_TRUE(RecvAll(stream.get(), got.data(), got.size(), Soon()).ok());
      bool gone = false;
      owner_.regions()->UnregisterLater(cache.cache_id, [&gone] { gone = true; });
      ASSERT_TRUE(gone) << bytes;
      EXPECT_EQ(got, PatternOf(shape, seed)) << bytes;
    }
  }
}

// ---- the initiator's end against a peer that answers nonsense ----

class TcpInitiator : public testing::Test {
 protected:
  TcpInitiator() {
    int ends[2];
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    peer_ = Fd(ends[0]);
    std::vector<Fd> streams;
    streams.emplace_back(ends[1]);
    path_ = MakeTcpDataPath(std::move(streams), std::make_shared<WorkerPool>(1));
    remote_.cache_id = 1;
    remote_.generation = 1;
    remote_.geometry = local_.pin().cache().geometry();
  }

  void AwaitRequest() {
    uint8_t bytes[kRequestHeaderBytes + kSpanBytes];
    ASSERT_TRUE(RecvAll(peer_.get(), bytes, sizeof(bytes), Soon()).ok());
  }
  Status Transfer(bool pull) {
    const TransferOp op{&remote_, &local_.pin(), 0, 0, 2, {{0, 0, 64}}};
    return pull ? path_->Pull(op, Soon()) : path_->Push(op, Soon());
  }

  LocalCache local_{kShape, 3};
  RemoteCache remote_;
  Fd peer_;
  std::unique_ptr<DataPath> path_;
};

TEST_F(TcpInitiator, CloseWakesACallThatWaits) {
  Status status;
  std::thread waiter([&] { status = Transfer(true); });
  AwaitRequest();
  path_->Close();
  waiter.join();
  EXPECT_EQ(status.code(), LLM_FAILED) << status.text();
}

TEST_F(TcpInitiator, AnswerToAnotherRequestBreaksThePath) {
  Status status;
  std::thread caller([&] { status = Transfer(true); });
  AwaitRequest();
  Writer response;
  EncodeResponse(Status::Ok(), 999, response);
  ASSERT_TRUE(SendAll(peer_.get(), response.data(), response.size(), Soon()).ok());
  caller.join();
  EXPECT_EQ(status.code(), LLM_FAILED) << status.text();
  EXPECT_EQ(Transfer(true).code(), LLM_FAILED);
}

TEST_F(TcpInitiator, RefusalCarriesItsTextAndLeavesThePathUsable) {
  for (const bool pull : {true, false, true}) {
    Status status;
    std::thread caller([&] { status = Transfer(pull); });
    AwaitRequest();
    Writer response;
    EncodeResponse(Status(LLM_KV_CACHE_NOT_EXIST, "cache 1 went away"), 2 * 64, response);
    ASSERT_TRUE(SendAll(peer_.get(), response.data(), response.size(), Soon()).ok());
    caller.join();
    EXPECT_EQ(status.code(), LLM_KV_CACHE_NOT_EXIST);
    EXPECT_NE(status.text().find("cache 1 went away"), std::string::npos);
  }
}

TEST_F(TcpInitiator, PeerThatEndsInsideTheBytesBreaksThePath) {
  Status status;
  std::thread caller([&] { status = Transfer(true); });
  AwaitRequest();
  Writer response;
  EncodeResponse(Status::Ok(), 2 * 64, response);
  response.Bytes("12345", 5);
  ASSERT_TRUE(SendAll(peer_.get(), response.data(), response.size(), Soon()).ok());
  peer_.Reset();
  caller.join();
  EXPECT_EQ(status.code(), LLM_FAILED) << status.text();
}

}  // namespace
}  // namespace datadist::test
