// Who a peer is: what it says of itself counts for nothing where the kernel does not say the same.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <thread>

#include "base/socket_io.h"
#include "support/frames.h"
#include "support/member.h"
#include "support/stranger.h"

namespace datadist::testing {
namespace {

using llm_datadist::LLM_ALREADY_LINK;
using llm_datadist::LLM_LINK_FAILED;
using llm_datadist::LLM_PARAM_INVALID;
using ::testing::HasSubstr;

Status RejectedWith(const Frame &frame) {
  EXPECT_EQ(frame.type, MessageType::kReject);
  const Result<Reject> reject = Decode<Reject>(frame.body);
  return reject.ok() ? reject.value().status : reject.status();
}

// Memory is given to, and taken from, whom the kernel names, and nobody else.
class Identity : public ::testing::TestWithParam<const char *> {};

TEST_P(Identity, OverTcpAClientCannotTakeMemoryByItself) {
  Member victim(2, OpenToAll());
  Stranger stranger(victim.Listen());
  stranger.Greet(InfoOf(1));
  stranger.Say(MessageType::kReady, Encode(Ready{GetParam(), ""}));
  EXPECT_THAT(RejectedWith(stranger.Hear(MessageType::kReady)).text(), HasSubstr("that the kernel names"));
}

TEST_P(Identity, OverTcpAServerCannotTakeMemoryByItself) {
  Member victim(1, OpenToAll());
  const Listeners listeners = Listen(FreeAddress()).value();
  const SocketAddress address = SocketAddress::LocalOf(listeners.tcp.get());
  const_cast<Fd &>(listeners.local).Reset();
  std::thread server([&] {
    Fd accepted;
    while (!accepted) {
      accepted = Fd(::accept(listeners.tcp.get(), nullptr, nullptr));
    }
    Stranger stranger(std::move(accepted));
    stranger.Hear(MessageType::kHello);
    stranger.Say(MessageType::kWelcome, Encode(Welcome{InfoOf(2), LinkToken{1}}));
    stranger.Hear(MessageType::kReady);
    stranger.Say(MessageType::kReady, Encode(Ready{GetParam(), ""}), 2);
  });
  const Status status = victim.Dial(address, 2);
  server.join();
  EXPECT_EQ(status.code(), LLM_LINK_FAILED) << status.text();
  EXPECT_THAT(status.text(), HasSubstr("that the kernel names"));
}

INSTANTIATE_TEST_SUITE_P(Transports, Identity, ::testing::Values("cma", "local"),
                         [](const auto &kind) { return std::string(kind.param); });

// What an endpoint of that process says of itself is no proof of being in it for who repeats it.
TEST(LocalTransport, IsNotForWhoRepeatsAnOffer) {
  Member one(1);
  Member victim(2, OpenToAll());
  Stranger stranger(victim.Listen());
  EndpointInfo info = InfoOf(3);
  info.incarnation = one.endpoint()->incarnation();
  info.transports = one.endpoint()->Info().transports;
  stranger.Greet(info);
  stranger.Say(MessageType::kReady, Encode(Ready{"tcp", ""}));
  const Result<Ready> ready = Decode<Ready>(stranger.Hear(MessageType::kReady).body);
  ASSERT_TRUE(ready.ok());
  EXPECT_EQ(ready.value().transport, "tcp");
}

// A peer is who was asked for, or nobody.
TEST(Links, ToAnotherIdThanTheExpectedOneAreRefused) {
  Member server(2);
  Member client(1);
  const SocketAddress address = server.Listen();
  const Status status = client.Dial(address, 3);
  EXPECT_EQ(status.code(), LLM_PARAM_INVALID);
  EXPECT_THAT(status.text(), HasSubstr("cluster 2 listens there, not cluster 3"));
  EXPECT_FALSE(client.Linked(2));
  EXPECT_TRUE(client.Dial(address, 2).ok());
}

TEST(Links, OfALivePeerAreNotTakenOverByWhoClaimsItsId) {
  Member server(2, OpenToAll());
  Member client(1);
  const SocketAddress address = server.Listen();
  ASSERT_TRUE(client.Dial(address, 2).ok());
  for (const bool knows_incarnation : {false, true}) {
    Stranger stranger(address);
    EndpointInfo info = InfoOf(1);
    if (knows_incarnation) {
      info.incarnation = client.endpoint()->incarnation();
    }
    EXPECT_EQ(RejectedWith(stranger.Greet(info, true)).code(), LLM_ALREADY_LINK);
  }
  const int64_t remote = server.AddCache(5);
  const int64_t local = client.AddCache(6);
  EXPECT_TRUE(client.Pull(2, remote, local, 0, 0, Member::kShape.num_blocks).ok());
  EXPECT_EQ(client.Bytes(local), server.Bytes(remote));
}

// Two that claim one id at once: the second comes too late, also when both were let in before either was linked.
TEST(Links, MadeMeanwhileAreNotTakenOver) {
  Member server(2, OpenToAll());
  Member client(1);
  const SocketAddress address = server.Listen();
  Stranger stranger(address);
  const Result<Welcome> welcome = Decode<Welcome>(stranger.Greet(InfoOf(1)).body);
  ASSERT_TRUE(welcome.ok());
  ASSERT_TRUE(client.Dial(address, 2).ok());
  const std::shared_ptr<Link> link = server.table()->Find(1);
  stranger.Say(MessageType::kReady, Encode(Ready{"tcp", ""}), 2);
  stranger.Hear(MessageType::kReady);
  std::vector<Fd> streams;
  for (const Initiator initiator : {Initiator::kClient, Initiator::kServer}) {
    streams.push_back(AttachedStream(address, Attach{welcome.value().token, initiator, 0}));
    ASSERT_TRUE(streams.back());
  }
  stranger.Say(MessageType::kEstablished, {}, 3);
  EXPECT_TRUE(stranger.IsTurnedAway());
  EXPECT_EQ(server.table()->Find(1), link);
  EXPECT_TRUE(link->alive());
}

// Who has lost its half of a link, and is the same process still, gets it anew.
TEST(Links, AreMadeAnewForTheirOwnPeer) {
  Member server(2);
  Member client(1);
  const SocketAddress address = server.Listen();
  ASSERT_TRUE(client.Dial(address, 2).ok());
  const std::shared_ptr<Link> half = client.table()->Find(2);
  client.table()->Remove(half.get());  // alive, and forgotten
  const Status status = client.Dial(address, 2);
  EXPECT_TRUE(status.ok()) << status.text();
}

// What nobody here asked for leaves with its peer.
TEST(Links, OfPeersThatDiedAreNotCounted) {
  LinkOptions few;
  few.max_links = 4;
  Member server(1000, few);
  const SocketAddress address = server.Listen();
  for (uint64_t life = 1; life <= 100; ++life) {
    Member client(life);
    const Status status = client.Dial(address, 1000);
    ASSERT_TRUE(status.ok()) << "life " << life << ": " << status.text();
    client.table()->Find(1000)->Close("dies without a word");
    ASSERT_TRUE(Eventually([&] { return server.table()->Find(life) == nullptr; })) << "life " << life;
  }
  EXPECT_TRUE(server.table()->Empty());
}

// Connections that greet and go no further, from one host, keep nobody out: not of another, nor of the same.
TEST(Floods, OfGreetingsKeepNobodyOut) {
  Member server(1000, OpenToAll());
  const SocketAddress address = server.Listen();
  std::vector<Stranger> flood;
  for (uint64_t id = 1; id <= 100; ++id) {
    flood.emplace_back(address);
    EXPECT_EQ(flood.back().Greet(InfoOf(id)).type, MessageType::kWelcome) << id;
  }
  EXPECT_TRUE(flood.front().IsTurnedAway()) << "64 at a time";
  Member client(500);
  const Status status = client.Dial(address, 1000);
  EXPECT_TRUE(status.ok()) << status.text();
}

// Nobody makes us serve more data connections than we would use ourselves.
TEST(Floods, OfDataConnectionsAreLimitedByOurOwnNumber) {
  LinkOptions two = OpenToAll();
  two.tcp_streams = 2;
  Member server(2, two);
  const SocketAddress address = server.Listen();
  Stranger stranger(address);
  EndpointInfo info = InfoOf(1);
  info.transports = OffersWith(16);
  const Result<Welcome> welcome = Decode<Welcome>(stranger.Greet(info).body);
  ASSERT_TRUE(welcome.ok());
  stranger.Say(MessageType::kReady, Encode(Ready{"tcp", ""}), 2);
  stranger.Hear(MessageType::kReady);
  std::vector<Fd> streams;
  for (uint16_t index = 0; index < 3; ++index) {
    streams.push_back(AttachedStream(address, Attach{welcome.value().token, Initiator::kClient, index}));
    EXPECT_EQ(static_cast<bool>(streams.back()), index < 2) << index;
  }
}

// A child of a process that listens is not that process: it keeps neither its address nor its connections.
TEST(Forked, ChildrenKeepNothingOfOurs) {
  SocketAddress address;
  Member client(1);
  pid_t child = -1;
  {
    Member server(2);
    address = server.Listen();
    ASSERT_TRUE(client.Dial(address, 2).ok());
    child = ::fork();
    if (child == 0) {
      ::pause();
      ::_exit(0);
    }
  }
  EXPECT_TRUE(Eventually([&] { return !client.Linked(2); })) << "the connection ends with its owner";
  EXPECT_EQ(client.Dial(address, 2).code(), LLM_LINK_FAILED) << "nobody listens there";
  EXPECT_TRUE(Listen(address).ok()) << "the address is free";
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
}

}  // namespace
}  // namespace datadist::testing
