// Bad peers: silent, cut off at any byte, talking nonsense, flooding; and calls that race. Whatever they do, calls end
// with a code in time, the listener goes on listening, and nothing is left behind.
#include <dirent.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/time.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <ctime>
#include <functional>
#include <thread>

#include "base/crc32c.h"
#include "control/address.h"
#include "control/frame.h"
#include "control/messages.h"
#include "support/chopping_proxy.h"
#include "support/frames.h"
#include "support/node.h"
#include "support/peer_process.h"

namespace datadist::testing {
namespace {

using namespace llm_datadist;  // the codes, which every line here names
using ::testing::AnyOf;
using ::testing::HasSubstr;
using std::chrono::milliseconds;
using Code = llm_datadist::Status;
using Clock = std::chrono::steady_clock;

// Strangers and proxies come over TCP, without a key.
const TextOptions kOpenToAll = {{OPTION_INSECURE, "1"}};
constexpr uint64_t kClient = 1;
constexpr uint64_t kServer = 2;
constexpr Shape kShape{4, 16, 4096};
// What a loaded machine may add to a deadline.
constexpr milliseconds kSlack{10'000};

size_t CountEntries(const char *directory) {
  size_t count = 0;
  DIR *const dir = ::opendir(directory);
  while (::readdir(dir) != nullptr) {
    ++count;
  }
  ::closedir(dir);
  return count;
}
size_t OpenDescriptors() { return CountEntries("/proc/self/fd"); }
size_t Threads() { return CountEntries("/proc/self/task"); }

Fd DialPort(uint16_t port) {
  Result<Fd> fd = DialTcp(SocketAddress::FromIp(kLoopback, port).value(), Deadline::In(milliseconds(5000)));
  return fd.ok() ? std::move(fd).value() : Fd();
}

// Whether the other end closes, without another byte, within a generous time.
bool IsClosedByPeer(int fd) {
  const timeval limit{10, 0};
  ::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
  std::array<char, 256> buffer;
  ssize_t size = 0;
  pollfd wait{fd, POLLIN, 0};
  ::poll(&wait, 1, 10000);
  while ((size = ::recv(fd, buffer.data(), buffer.size(), MSG_DONTWAIT)) > 0) {
    ::poll(&wait, 1, 10000);
  }
  return size == 0 || errno == ECONNRESET;
}

class Faults : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(server_.Start(ServerOptions(kOpenToAll)), LLM_SUCCESS) << GetLastErrorText();
    ASSERT_EQ(client_.Start(ClientOptions(kOpenToAll)), LLM_SUCCESS) << GetLastErrorText();
    theirs_ = server_.AddCache(kShape, 2);
    mine_ = client_.AddCache(kShape, 1);
  }
  void ExpectHealthy() {
    ASSERT_EQ(client_.Link(kServer, server_.port()), LLM_SUCCESS) << GetLastErrorText();
    ASSERT_EQ(client_.Pull(kServer, theirs_, mine_, {0, 3}, {1, 2}), LLM_SUCCESS) << GetLastErrorText();
    ASSERT_EQ(client_.Unlink(kServer, server_.port()), LLM_SUCCESS) << GetLastErrorText();
  }
  Node server_{kServer};
  Node client_{kClient};
  int64_t theirs_ = 0;
  int64_t mine_ = 0;
};

TEST_F(Faults, PeerThatAcceptsAndNeverAnswersIsAFailedLinkInTime) {
  const Listeners silent = Listen(SocketAddress::FromIp(kLoopback, 0).value()).value();
  const auto start = Clock::now();
  EXPECT_EQ(client_.Link(kServer, SocketAddress::LocalOf(silent.tcp.get()).port(), 200), LLM_LINK_FAILED);
  EXPECT_GE(Clock::now() - start, milliseconds(200));
  EXPECT_LT(Clock::now() - start, milliseconds(200) + kSlack);
  ExpectHealthy();
}

TEST_F(Faults, SilentPeersDelayNeitherEachOtherNorTheRest) {
  const Listeners silent = Listen(SocketAddress::FromIp(kLoopback, 0).value()).value();
  std::vector<ClusterInfo> clusters;
  for (uint64_t id = 50; id < 58; ++id) {
    clusters.push_back(Cluster(id, SocketAddress::LocalOf(silent.tcp.get()).port()));
  }
  clusters.push_back(Cluster(60, 1));
  clusters.back().remote_ip_infos.clear();
  clusters.push_back(Cluster(kServer, server_.port()));
  std::vector<Code> expected(8, LLM_LINK_FAILED);
  expected.insert(expected.end(), {LLM_PARAM_INVALID, LLM_SUCCESS});

  std::vector<Code> rets(3, 77);
  const auto start = Clock::now();
  EXPECT_EQ(client_.datadist().LinkLlmClusters(clusters, rets, 3000), LLM_PARAM_INVALID) << "the last failure";
  EXPECT_LT(Clock::now() - start, milliseconds(3000) + kSlack) << "one after another they take eight times as long";
  EXPECT_THAT(GetLastErrorText(), HasSubstr("clusters[8] (remote_cluster_id 60): remote_ip_infos: 0 entries"));
  EXPECT_EQ(rets, expected) << "cleared first";
  EXPECT_TRUE(client_.Alive(kServer));
}

TEST_F(Faults, HandshakeCutAtEveryByte) {
  uint64_t cuts = 0;
  for (uint64_t limit = 1;; ++limit) {
    ChoppingProxy proxy(server_.port(), limit);
    const Code status = client_.Link(kServer, proxy.port(), 5000);
    if (status == LLM_SUCCESS) {
      EXPECT_GT(limit, 300U) << "a whole handshake is longer";
      break;
    }
    ASSERT_EQ(status, LLM_LINK_FAILED) << "cut after " << limit << ": " << GetLastErrorText();
    ASSERT_TRUE(proxy.cut());
    ++cuts;
  }
  EXPECT_GT(cuts, 300U);
  client_.Unlink(kServer, server_.port(), 1000, true);
  ExpectHealthy();
}

TEST_F(Faults, TcpHandshakeCutAtManyBytes) {
  Node tcp(7);
  ASSERT_EQ(tcp.Start(ClientOptions({{OPTION_TRANSPORT, "tcp"}, {OPTION_INSECURE, "1"}})), LLM_SUCCESS);
  for (uint64_t limit = 1;; limit += 13) {
    ChoppingProxy proxy(server_.port(), limit);
    const Code status = tcp.Link(kServer, proxy.port(), 5000);
    if (status == LLM_SUCCESS) {
      EXPECT_GT(limit, 400U);
      break;
    }
    ASSERT_EQ(status, LLM_LINK_FAILED) << "cut after " << limit << ": " << GetLastErrorText();
  }
  ExpectHealthy();
}

std::vector<uint8_t> GoodHello(uint64_t cluster_id, uint32_t remaining_ms = 5000) {
  Hello hello;
  hello.versions = {kProtocolVersion, kProtocolVersion};
  hello.client.cluster_id = cluster_id;
  hello.client.role = 1;
  hello.remaining_ms = remaining_ms;
  hello.force_link = true;
  return Encode(hello);
}

TEST_F(Faults, MalformedFramesCostOneConnectionEach) {
  std::vector<uint8_t> magic = EncodeFrame(MessageType::kHello, 1, GoodHello(9));
  magic[0] = 0;
  std::vector<uint8_t> checksum = EncodeFrame(MessageType::kHello, 1, GoodHello(9));
  checksum.back() ^= 1;
  std::vector<uint8_t> oversized = EncodeFrame(MessageType::kHello, 1, {});
  oversized[8] = oversized[9] = oversized[10] = 0xFF;
  std::vector<uint8_t> unknown = EncodeFrame(MessageType::kHello, 1, {});
  unknown[6] = 99;
  std::vector<uint8_t> trailing = GoodHello(9);
  trailing.push_back(0);
  const std::vector<std::pair<const char *, std::vector<uint8_t>>> cases = {
      {"magic", magic},
      {"checksum", checksum},
      {"oversized", oversized},
      {"unknown type", unknown},
      {"trailing byte", EncodeFrame(MessageType::kHello, 1, trailing)},
      {"empty hello", EncodeFrame(MessageType::kHello, 1, {})},
      {"ping before hello", EncodeFrame(MessageType::kPing, 1, {})},
      {"describe before hello", EncodeFrame(MessageType::kDescribe, 1, Encode(DescribeRequest{CacheRef::Id(1)}))},
      {"established before hello", EncodeFrame(MessageType::kEstablished, 1, {})},
      {"attach with a token of nobody", EncodeFrame(MessageType::kAttach, 1, Encode(Attach{}))},
      {"http", [] {
         const std::string get = "GET / HTTP/1.1\r\nHost: here\r\n\r\n";
         return std::vector<uint8_t>(get.begin(), get.end());
       }()},
  };
  for (const auto &[what, bytes] : cases) {
    SCOPED_TRACE(what);
    const Fd fd = DialPort(server_.port());
    ASSERT_EQ(::send(fd.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL), static_cast<ssize_t>(bytes.size()));
    EXPECT_TRUE(IsClosedByPeer(fd.get()));
  }
  ExpectHealthy();
}

TEST_F(Faults, VersionMismatchNamesBothVersions) {
  std::vector<uint8_t> hello = GoodHello(9);
  hello[0] = hello[2] = 90;
  const Fd fd = DialPort(server_.port());
  const Deadline deadline = Deadline::In(milliseconds(5000));
  ASSERT_TRUE(SendFrame(fd.get(), MessageType::kHello, 1, hello, deadline).ok());
  const Result<Frame> frame = RecvFrame(fd.get(), TypeSet(MessageType::kReject), deadline);
  ASSERT_TRUE(frame.ok()) << frame.status().text();
  const Result<Reject> reject = Decode<Reject>(frame.value().body);
  ASSERT_TRUE(reject.ok());
  EXPECT_EQ(reject.value().status.code(), LLM_LINK_FAILED);
  EXPECT_THAT(reject.value().status.text(), HasSubstr("90..90"));
  EXPECT_THAT(reject.value().status.text(), HasSubstr("server " + std::to_string(kProtocolVersion) + ".."));
}

TEST_F(Faults, WrongStateAfterHelloClosesTheConnection) {
  for (const MessageType type : {MessageType::kHello, MessageType::kEstablished, MessageType::kAttach,
                                 MessageType::kUnlink, MessageType::kDescribe, MessageType::kPing}) {
    SCOPED_TRACE(MessageName(type));
    const Fd fd = DialPort(server_.port());
    const Deadline deadline = Deadline::In(milliseconds(5000));
    ASSERT_TRUE(SendFrame(fd.get(), MessageType::kHello, 1, GoodHello(9), deadline).ok());
    ASSERT_TRUE(RecvFrame(fd.get(), TypeSet(MessageType::kWelcome), deadline).ok());
    ASSERT_TRUE(SendFrame(fd.get(), type, 2, GoodHello(9), deadline).ok());
    EXPECT_TRUE(IsClosedByPeer(fd.get()));
  }
  ExpectHealthy();
}

TEST_F(Faults, HandshakeOfAClientThatStopsEndsAtItsDeadline) {
  const Fd fd = DialPort(server_.port());
  const Deadline deadline = Deadline::In(milliseconds(5000));
  ASSERT_TRUE(SendFrame(fd.get(), MessageType::kHello, 1, GoodHello(9, 1000), deadline).ok());
  ASSERT_TRUE(RecvFrame(fd.get(), TypeSet(MessageType::kWelcome), deadline).ok());
  EXPECT_TRUE(IsClosedByPeer(fd.get())) << "a server holds one for up to half a minute";
}

TEST_F(Faults, FloodOfSilentConnectionsDoesNotKeepAPeerOut) {
  std::vector<Fd> silent;
  for (int i = 0; i < 100; ++i) {
    silent.push_back(DialPort(server_.port()));
    ASSERT_TRUE(silent.back());
  }
  ExpectHealthy();
  EXPECT_TRUE(IsClosedByPeer(silent.front().get())) << "at most 64 at a time: the oldest goes";
}

TEST_F(Faults, StoppedPeerIsLostAfterThreeSilentIntervals) {
  PeerProcess peer;
  ASSERT_EQ(peer.Start(5, ServerOptions()), LLM_SUCCESS);
  Node watcher(6);
  constexpr milliseconds kHeartbeat{500};
  ASSERT_EQ(watcher.Start(ClientOptions({{OPTION_HEARTBEAT_MS, std::to_string(kHeartbeat.count())}})), LLM_SUCCESS);
  ASSERT_EQ(watcher.Link(5, peer.port()), LLM_SUCCESS) << GetLastErrorText();
  const auto start = Clock::now();  // the peer may have said its last word up to one interval before
  peer.Signal(SIGSTOP);
  while (watcher.Alive(5) && Clock::now() - start < 5 * kHeartbeat + kSlack) {
    std::this_thread::sleep_for(milliseconds(2));
  }
  EXPECT_FALSE(watcher.Alive(5));
  EXPECT_GE(Clock::now() - start, kHeartbeat);
}

TEST(Resources, DescriptorsAndThreadsReturnToTheBaseline) {
  const auto round = [](const char *transport) {
    Node server(kServer);
    Node client(kClient);
    ASSERT_EQ(server.Start(ServerOptions()), LLM_SUCCESS);
    ASSERT_EQ(client.Start(ClientOptions({{OPTION_TRANSPORT, transport}})), LLM_SUCCESS);
    const int64_t theirs = server.AddCache(kShape, 2);
    const int64_t mine = client.AddCache(kShape, 1);
    for (int i = 0; i < 3; ++i) {
      ASSERT_EQ(client.Link(0, server.port()), LLM_SUCCESS) << GetLastErrorText();
      ASSERT_EQ(client.Pull(kServer, theirs, mine, {0}, {0}), LLM_SUCCESS);
    }
    ASSERT_EQ(client.Unlink(kServer, server.port()), LLM_SUCCESS);
    ASSERT_EQ(client.Link(kServer, server.port()), LLM_SUCCESS);
  };
  round("auto");  // what stays once per process (probe pages, random device) is there from now on
  round("tcp");
  const size_t descriptors = OpenDescriptors();
  const size_t threads = Threads();
  for (const char *transport : {"local", "cma", "tcp"}) {
    round(transport);
  }
  EXPECT_EQ(OpenDescriptors(), descriptors);
  EXPECT_EQ(Threads(), threads);
}

TEST(Resources, IdleLinkedEnginesUseNoCpu) {
  Node server(kServer);
  Node client(kClient);
  ASSERT_EQ(server.Start(ServerOptions()), LLM_SUCCESS);
  ASSERT_EQ(client.Start(ClientOptions({{OPTION_TRANSPORT, "tcp"}})), LLM_SUCCESS);
  ASSERT_EQ(client.Link(kServer, server.port()), LLM_SUCCESS);
  timespec before{};
  timespec after{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &before);
  // A peer that never answers holds this thread in a blocking call for as long as its timeout says.
  const Listeners silent = Listen(SocketAddress::FromIp(kLoopback, 0).value()).value();
  Node other(3);
  ASSERT_EQ(other.Start(ClientOptions()), LLM_SUCCESS);
  EXPECT_EQ(other.Link(9, SocketAddress::LocalOf(silent.tcp.get()).port(), 2000), LLM_LINK_FAILED);
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &after);
  const double used = static_cast<double>(after.tv_sec - before.tv_sec) +
                      static_cast<double>(after.tv_nsec - before.tv_nsec) * 1e-9;
  EXPECT_LT(used, 0.2) << "CPU seconds of two idle ones; of a core that others use, too, a spinning thread gets more";
}

// Every call may end with any of these here; none may hang, crash or race.
void ExpectPlausible(Code status) {
  EXPECT_THAT(status, AnyOf(LLM_SUCCESS, LLM_FAILED, LLM_NOT_YET_LINK, LLM_ALREADY_LINK, LLM_PROCESSING_LINK,
                            LLM_LINK_FAILED, LLM_UNLINK_FAILED, LLM_TIMEOUT, LLM_KV_CACHE_NOT_EXIST))
      << GetStatusName(status) << " " << GetLastErrorText();
}

class Races : public ::testing::TestWithParam<const char *> {};

TEST_P(Races, LinkUnlinkPullUnregisterAndFinalizeTogether) {
  Node server(kServer);
  Node client(kClient);
  ASSERT_EQ(server.Start(ServerOptions({{OPTION_TRANSPORT, GetParam()}})), LLM_SUCCESS);
  ASSERT_EQ(client.Start(ServerOptions({{OPTION_TRANSPORT, GetParam()}})), LLM_SUCCESS);
  const int64_t theirs = server.AddCache(kShape, 2);
  const int64_t mine = client.AddCache(kShape, 1);
  const uint16_t server_port = server.port();
  const uint16_t client_port = client.port();
  std::atomic<bool> stop{false};
  std::atomic<int> moved{0};
  std::vector<std::thread> threads;
  const auto repeat = [&](const std::function<void()> &act) {
    threads.emplace_back([&stop, act] {
      while (!stop.load()) {
        act();
      }
    });
  };
  repeat([&] { ExpectPlausible(client.Link(kServer, server_port)); });
  repeat([&] { ExpectPlausible(server.Link(kClient, client_port)); });
  repeat([&] { ExpectPlausible(client.Unlink(kServer, server_port)); });
  repeat([&] { ExpectPlausible(server.Unlink(kClient, client_port, 1000, true)); });
  repeat([&] {
    const Code status = client.Pull(kServer, theirs, mine, {0, 1, 2}, {5, 6, 7});
    ExpectPlausible(status);
    moved += status == LLM_SUCCESS ? 1 : 0;
  });
  repeat([&] { ExpectPlausible(server.Push(theirs, kClient, mine, {8}, {9})); });
  const auto start = Clock::now();
  while (moved.load() < 20 && Clock::now() - start < std::chrono::seconds(120)) {
    std::this_thread::sleep_for(milliseconds(2));
  }
  EXPECT_GE(moved.load(), 20) << "the race must not have starved what it is about";
  server.datadist().Finalize();
  stop.store(true);
  for (std::thread &thread : threads) {
    thread.join();
  }
  client.datadist().Finalize();
}

INSTANTIATE_TEST_SUITE_P(Transports, Races, ::testing::Values("local", "cma", "tcp"),
                         [](const auto &name) { return std::string(name.param); });

}  // namespace
}  // namespace datadist::testing

int main(int argc, char **argv) {
  datadist::testing::RunIfPeer(argc, argv);
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
