// Many data connections on few threads: none takes a thread, none holds up another, none costs what it announces.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <list>
#include <string>

#include "base/socket_io.h"
#include "support/handmade_link.h"
#include "support/member.h"
#include "transport/tcp/connection.h"
#include "transport_support/initiator.h"
#include "transport_support/requests.h"

namespace datadist::testing {
namespace {

using datadist::test::CacheShape;
using datadist::test::Encoded;
using datadist::test::GoodHeader;
using datadist::test::LocalCache;
using datadist::test::OwnerHere;
using datadist::test::PatternOf;
using std::chrono::milliseconds;

size_t EntriesOf(const char *folder) {
  return static_cast<size_t>(std::distance(std::filesystem::directory_iterator(folder), {}));
}
size_t Threads() { return EntriesOf("/proc/self/task"); }
size_t Descriptors() { return EntriesOf("/proc/self/fd"); }

uint64_t ResidentBytes() {
  uint64_t size = 0;
  uint64_t resident = 0;
  std::ifstream("/proc/self/statm") >> size >> resident;
  return resident * static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
}

Status Send(const Fd &stream, const std::vector<uint8_t> &bytes, size_t size) {
  return SendAll(stream.get(), bytes.data(), size, Soon());
}

// ---- a link's worth ----

TEST(Links512, TakeDescriptorsButNoThreadsAndNoMemoryForWhatTheyAnnounce) {
  constexpr uint64_t kLinks = 512;
  constexpr size_t kDescriptorsOfALink = 6;  // three connections, both ends in this process
  rlimit files{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &files), 0);
  files.rlim_cur = files.rlim_max;
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &files), 0);
  LinkOptions options = OpenToAll();
  options.heartbeat_interval = std::chrono::minutes(10);  // strangers do not answer
  options.max_links = kLinks + 1;
  options.forced_transport = "tcp";
  Member server(1000, options);
  const SocketAddress address = server.Listen();
  constexpr uint64_t kFirst = 16;  // more than there are threads for
  size_t descriptors = 0;
  size_t threads = 0;
  std::list<HandmadeLink> links;
  for (uint64_t id = 1; id <= kLinks; ++id) {
    links.emplace_back(address, id);
    ASSERT_TRUE(Eventually([&] { return server.Linked(id); })) << id;
    if (id == kFirst) {
      descriptors = Descriptors();
      threads = Threads();
    }
    if (id % 128 == 0) {
      EXPECT_EQ(Descriptors(), descriptors + (id - kFirst) * kDescriptorsOfALink);
      EXPECT_EQ(Threads(), threads);
    }
  }

  const uint64_t resident = ResidentBytes();
  RequestHeader header = GoodHeader({});
  header.span_count = kMaxSpansPerRequest;
  const std::vector<uint8_t> bytes = Encoded(header, std::vector<Span>(kMaxSpansPerRequest, Span{0, 1}));
  for (const HandmadeLink &link : links) {
    ASSERT_TRUE(Send(link.served, bytes, kRequestHeaderBytes + 1).ok());
  }
  // The answer to another's request, sent after theirs, says that theirs have been read: turns go round.
  const int64_t remote = server.AddCache(5);
  Member client(2000, options);
  ASSERT_TRUE(client.Dial(address, 1000).ok());
  const int64_t local = client.AddCache(6);
  ASSERT_TRUE(client.Pull(1000, remote, local, 0, 0, Member::kShape.num_blocks).ok());
  EXPECT_EQ(client.Bytes(local), server.Bytes(remote));
  EXPECT_LT(ResidentBytes(), resident + (64 << 20)) << "of 256 MiB that were announced";

  links.clear();
  ASSERT_TRUE(client.Unlink(1000).ok());
  EXPECT_TRUE(Eventually([&] { return server.table()->Empty(); }));
}

TEST(Links512, AreGoneWithoutATrace) {
  Member server(1000, OpenToAll());
  const SocketAddress address = server.Listen();
  constexpr size_t kOfThreads = 8;  // one each, for good
  const size_t before = Descriptors();
  for (int round = 0; round < 4; ++round) {
    std::list<HandmadeLink> links;
    for (uint64_t id = 1; id <= 32; ++id) {
      links.emplace_back(address, id);
      ASSERT_TRUE(Eventually([&] { return server.Linked(id); })) << id;
    }
    links.clear();
    EXPECT_TRUE(Eventually([&] { return server.table()->Empty() && Descriptors() <= before + kOfThreads; })) << round;
  }
}

// ---- peers that stop ----

const CacheShape kLarge{2, 4, 1 << 20};

// The header of a request for all of a cache.
RequestHeader WholeOf(const RemoteCache &cache, DataOp op) {
  RequestHeader header = GoodHeader(cache);
  header.op = op;
  header.total_bytes = kLarge.num_tensors * kLarge.num_blocks * kLarge.stride;
  return header;
}

const std::vector<Span> kWhole = {{0, kLarge.num_blocks * kLarge.stride}};

class FrozenPeers : public ::testing::Test {
 protected:
  Fd Connect() {
    Fd stream = datadist::test::Dial(port_);
    owner_.Serve(1, std::chrono::minutes(10));
    return stream;
  }
  Status HearGo(const Fd &stream) {
    uint8_t bytes[kResponseHeaderBytes];
    if (Status status = RecvAll(stream.get(), bytes, sizeof(bytes), Soon()); !status.ok()) {
      return status;
    }
    const Result<ResponseHeader> header = DecodeResponseHeader(bytes);
    return header.ok() ? Status(header.value().status, "") : header.status();
  }

  std::unique_ptr<datadist::test::Owner> here_ = std::make_unique<OwnerHere>();
  OwnerHere &owner_ = static_cast<OwnerHere &>(*here_);
  const uint16_t port_ = owner_.Listen();
};

TEST_F(FrozenPeers, HoldUpNobody) {
  constexpr size_t kFrozen = 64;
  const RemoteCache source = owner_.AddCache(kLarge, 1);
  const std::vector<uint8_t> pattern = PatternOf(kLarge, 1);
  RequestHeader pull = WholeOf(source, DataOp::kPull);
  pull.remaining_ms = 600'000;
  std::vector<Fd> readers;
  std::vector<Fd> writers;
  std::vector<RemoteCache> targets;
  for (size_t i = 0; i < kFrozen / 2; ++i) {
    readers.push_back(Connect());
    const int small = 64 << 10;  // or the kernel would take all of it
    ASSERT_EQ(::setsockopt(readers.back().get(), SOL_SOCKET, SO_RCVBUF, &small, sizeof(small)), 0);
    const std::vector<uint8_t> request = Encoded(pull, kWhole);
    ASSERT_TRUE(Send(readers.back(), request, request.size()).ok());
    ASSERT_TRUE(HearGo(readers.back()).ok());  // and then reads no further

    writers.push_back(Connect());
    targets.push_back(owner_.AddCache(kLarge, 100 + i));
    RequestHeader push = WholeOf(targets.back(), DataOp::kPush);
    push.remaining_ms = 600'000;
    const std::vector<uint8_t> asked = Encoded(push, kWhole);
    ASSERT_TRUE(Send(writers.back(), asked, asked.size()).ok());
    ASSERT_TRUE(HearGo(writers.back()).ok());
    ASSERT_TRUE(Send(writers.back(), pattern, pattern.size() / 2).ok());  // and then writes no further
  }

  const auto path = datadist::test::ConnectTcp(owner_, 2, std::make_shared<WorkerPool>(2), std::chrono::minutes(10));
  const RemoteCache healthy = owner_.AddCache(kLarge, 7);
  for (uint64_t seed = 20; seed < 30; ++seed) {
    LocalCache local(kLarge, seed);
    const TransferOp op{&healthy, &local.pin(), 0, 0, kLarge.num_tensors, {{0, 0, kWhole[0].length}}};
    const Status pushed = path->Push(op, Soon());
    ASSERT_TRUE(pushed.ok()) << pushed.text();
    EXPECT_EQ(owner_.Bytes(healthy.cache_id), PatternOf(kLarge, seed));
    local.Fill(std::vector<uint8_t>(pattern.size()));
    const Status pulled = path->Pull(op, Soon());
    ASSERT_TRUE(pulled.ok()) << pulled.text();
    EXPECT_EQ(local.Bytes(), PatternOf(kLarge, seed));
  }

  for (size_t i = 0; i < writers.size(); ++i) {  // who goes on is served where it stopped
    ASSERT_TRUE(SendAll(writers[i].get(), pattern.data() + pattern.size() / 2, pattern.size() / 2, Soon()).ok());
    ASSERT_TRUE(HearGo(writers[i]).ok());
    EXPECT_EQ(owner_.Bytes(targets[i].cache_id), pattern);
  }
}

// One thread, and a socket that takes less than a call has for it.
TEST_F(FrozenPeers, LeaveTheirThreadToOthers) {
  const RemoteCache cache = owner_.AddCache(kLarge, 1);
  const std::vector<uint8_t> request = Encoded(WholeOf(cache, DataOp::kPull), kWhole);
  TcpService service(1);
  std::list<TcpServer> servers;
  std::vector<Fd> peers;
  for (int i = 0; i < 8; ++i) {
    int ends[2];
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    peers.emplace_back(ends[0]);
    servers.emplace_back(service, Fd(ends[1]), owner_.regions(), 0, std::chrono::minutes(10));
    ASSERT_TRUE(Send(peers.back(), request, request.size()).ok());
    const Status go = HearGo(peers.back());
    ASSERT_TRUE(go.ok()) << i << ": " << go.text();
  }
  for (const Fd &peer : peers) {  // who goes on is served where it stopped
    std::vector<uint8_t> got(PatternOf(kLarge, 1).size());
    ASSERT_TRUE(RecvAll(peer.get(), got.data(), got.size(), Soon()).ok());
    EXPECT_EQ(got, PatternOf(kLarge, 1));
  }
}

// A cache is free of a peer that stopped in the middle as soon as its connection was closed and has ended.
TEST_F(FrozenPeers, EndWithTheirServer) {
  const RemoteCache cache = owner_.AddCache(kLarge, 1);
  TcpService service(2);
  for (const DataOp op : {DataOp::kPull, DataOp::kPush}) {
    int ends[2];
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    const Fd peer(ends[0]);
    TcpServer server(service, Fd(ends[1]), owner_.regions(), 0, std::chrono::minutes(10));
    RequestHeader header = WholeOf(cache, op);
    header.remaining_ms = 600'000;
    const std::vector<uint8_t> request = Encoded(header, kWhole);
    ASSERT_TRUE(Send(peer, request, request.size()).ok());
    ASSERT_TRUE(HearGo(peer).ok());
    server.Close();
    server.Join();
    char byte = 0;
    while (::recv(peer.get(), &byte, 1, MSG_DONTWAIT) == 1) {
    }
    EXPECT_EQ(::recv(peer.get(), &byte, 1, MSG_DONTWAIT), 0) << "closed, not merely silent";
  }
  bool gone = false;
  owner_.regions()->UnregisterLater(cache.cache_id, [&gone] { gone = true; });
  EXPECT_TRUE(gone) << "nothing holds it";
}

TEST_F(FrozenPeers, EndWithTheService) {
  const RemoteCache cache = owner_.AddCache(kLarge, 1);
  TcpService service(2);
  int ends[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
  const Fd peer(ends[0]);
  TcpServer server(service, Fd(ends[1]), owner_.regions(), 0, std::chrono::minutes(10));
  RequestHeader header = WholeOf(cache, DataOp::kPush);
  const std::vector<uint8_t> request = Encoded(header, kWhole);
  ASSERT_TRUE(Send(peer, request, request.size()).ok());
  ASSERT_TRUE(HearGo(peer).ok());
  service.Stop();
  server.Join();
  owner_.UnregisterAndReuse(cache.cache_id);

  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
  const Fd late(ends[0]);
  TcpServer refused(service, Fd(ends[1]), owner_.regions(), 0, std::chrono::minutes(10));
  refused.Join();
  char byte = 0;
  EXPECT_EQ(RecvAll(late.get(), &byte, 1, Soon()).code(), llm_datadist::LLM_FAILED);
}

// ---- turns ----

// However much the socket takes at once: who asks for bytes one by one makes many calls of a turn.
TEST(Turns, AreBounded) {
  const CacheShape shape{2, 2 * kMaxSpansPerRequest, 1};
  OwnerHere owner;
  const RemoteCache cache = owner.AddCache(shape, 1);
  int ends[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
  const Fd peer(ends[0]);
  const Fd served(ends[1]);
  TcpConnection connection(served.get(), owner.regions(), 0, std::chrono::minutes(10));
  std::vector<Span> spans;
  for (uint64_t i = 0; i < kMaxSpansPerRequest; ++i) {
    spans.push_back({2 * i, 1});
  }
  RequestHeader header = GoodHeader(cache);
  header.span_count = kMaxSpansPerRequest;
  header.total_bytes = 2 * spans.size();
  const std::vector<uint8_t> request = Encoded(header, spans);
  for (size_t sent = 0; sent < request.size();) {  // more than a socket buffer
    const ssize_t more = ::send(peer.get(), request.data() + sent, request.size() - sent, MSG_DONTWAIT);
    sent += more > 0 ? static_cast<size_t>(more) : 0;
    if (sent < request.size()) {
      ASSERT_NE(connection.Serve(), TcpConnection::Next::kEnd);
    }
  }
  std::vector<uint8_t> got;
  while (got.size() < kResponseHeaderBytes + header.total_bytes) {
    ASSERT_NE(connection.Serve(), TcpConnection::Next::kEnd);
    uint8_t bytes[65536];
    const ssize_t more = ::recv(peer.get(), bytes, sizeof(bytes), MSG_DONTWAIT);
    ASSERT_LE(more, 49152) << "the socket takes 64 KiB";
    got.insert(got.end(), bytes, bytes + std::max<ssize_t>(more, 0));
  }
  const std::vector<uint8_t> pattern = PatternOf(shape, 1);
  for (uint64_t i = 0; i < header.total_bytes; ++i) {
    ASSERT_EQ(got[kResponseHeaderBytes + i], pattern[2 * i]) << i;
  }
}

}  // namespace
}  // namespace datadist::testing
