// The client of the channel against servers that answer, that do not, and that do what they should not.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "support/channel_ends.h"
#include "support/chopping_proxy.h"
#include "support/key_file.h"

namespace datadist::testing {
namespace {

using std::chrono::milliseconds;

TEST(ChannelClient, GetsTheAnswerToEachRequest) {
  ServerEnd server;
  ClientEnd client;
  ASSERT_TRUE(server.server->SetGeometries({{{0, 0}, {1, 2}}, {{0, 1}, {3}}}).ok());
  const LeaseTable::Ticket ticket = server.Grant();
  const LeaseToken unknown{9};
  const uint64_t rank = client.Send(server.port(), AskRank(1));
  const uint64_t renewal = client.Send(server.port(), Renew{{unknown, ticket.token}});
  const uint64_t held = client.Send(server.port(), Confirm{ticket.token, ticket.generation, {{1}, {2}}});
  const uint64_t other = client.Send(server.port(), Confirm{ticket.token, ticket.generation, {{1}, {3}}});
  const uint64_t release = client.Send(server.port(), Release{{ticket.token, unknown}});
  const uint64_t gone = client.Send(server.port(), Confirm{ticket.token, ticket.generation, {{1}, {2}}});
  EXPECT_EQ(std::get<RankAnswer>(client.Wait(rank).answer).geometry, std::vector<uint8_t>{3});
  EXPECT_EQ(std::get<Renewed>(client.Wait(renewal).answer).gone, std::vector<LeaseToken>{unknown});
  EXPECT_EQ(std::get<Confirmed>(client.Wait(held).answer).verdict, LeaseVerdict::kHeld);
  EXPECT_EQ(std::get<Confirmed>(client.Wait(other).answer).verdict, LeaseVerdict::kOtherBlocks);
  EXPECT_TRUE(std::holds_alternative<Released>(client.Wait(release).answer));
  EXPECT_EQ(std::get<Confirmed>(client.Wait(gone).answer).verdict, LeaseVerdict::kGone);
}

TEST(ChannelClient, SaysWhatIsBeingPulled) {
  ServerEnd server;
  ClientEnd client;
  const LeaseTable::Ticket ticket = server.Grant();
  for (const bool pulling : {true, false}) {
    (void)client.Ask(server.port(), Renew{{ticket.token}, pulling});
    EXPECT_EQ(server.leases->RevokeIdle(ticket.token), !pulling);
  }
}

TEST(ChannelClient, IsToldWhyThereIsNoSuchRank) {
  ServerEnd server;
  ClientEnd client;
  ASSERT_TRUE(server.server->SetGeometries({{{0, 0}, {1}}, {{0, 1}, {1}}}).ok());
  const auto text = [&](const DescribeRank &asked) {
    return std::get<RankAnswer>(client.Ask(server.port(), asked).answer).status.text();
  };
  EXPECT_EQ(text(AskRank(2)), "no worker (pp, tp) = (0, 2); there are [(0, 0), (0, 1)]");
  EXPECT_EQ(text(DescribeRank{"other", {7}, {0, 0}, 1}), "another instance lives at this address now");
  EXPECT_EQ(text(DescribeRank{"engine-p", {8}, {0, 0}, 1}), "another instance lives at this address now");
}

TEST(ChannelClient, IsRefusedAtOnceWhereNobodyListens) {
  const uint16_t port = BareServer().port();
  ClientEnd client;
  const std::string failure = client.Failure(port);
  EXPECT_NE(failure.find("does not let us connect"), std::string::npos) << failure;
  EXPECT_NE(failure.find("refused"), std::string::npos) << failure;
  EXPECT_EQ(failure.find("timed out"), std::string::npos) << failure;
  const ChannelAnswer nonsense = client.Wait(client.client->Send("not an address", 1, Renew{}, kLong));
  EXPECT_NE(std::get<NoAnswer>(nonsense.answer).error.find("not an address"), std::string::npos);
}

// One that took the connection and says nothing, one that has no room for it, and one that took the greeting: to ask
// again may help. None of them holds up another server.
TEST(ChannelClient, EndsAtTheDeadlineWhereNobodyAnswers) {
  const BareServer silent;
  const BareServer full;
  const BareServer greeting;
  std::vector<Fd> backlog;
  while (true) {
    LocalStep step = TryLocal(Loopback(full.port()));
    if (step.full) {
      break;
    }
    ASSERT_TRUE(step.connection.fd);
    backlog.push_back(std::move(step.connection.fd));
  }
  ClientEnd client;
  const auto started = std::chrono::steady_clock::now();
  constexpr milliseconds kLimit{1000};  // time enough to be greeted
  const std::vector<uint64_t> sent = {client.Send(silent.port(), Renew{}, kLimit),
                                      client.Send(full.port(), Renew{}, kLimit),
                                      client.Send(greeting.port(), Renew{}, kLimit)};
  const Fd greeted = greeting.Welcome();
  ServerEnd healthy;
  EXPECT_EQ(client.Failure(healthy.port()), "");
  EXPECT_LT(std::chrono::steady_clock::now() - started, kLong);
  for (const uint64_t id : sent) {
    const NoAnswer none = std::get<NoAnswer>(client.Wait(id).answer);
    EXPECT_NE(none.error.find("did not answer in time"), std::string::npos) << none.error;
    EXPECT_TRUE(none.timed_out);
  }
  EXPECT_GE(std::chrono::steady_clock::now() - started, kLimit);
}

// Nothing that was meant for a dead server reaches its successor, unless it was on its way when that died.
TEST(ChannelClient, GetsAnswersFromAServerThatStartedAnew) {
  ClientEnd client;
  uint16_t port = 0;
  {
    ServerEnd first;
    port = first.port();
    EXPECT_EQ(client.Failure(port), "");
  }
  EXPECT_NE(client.Failure(port).find("does not let us connect"), std::string::npos);
  ServerEnd second({}, port);
  EXPECT_EQ(client.Failure(port), "");
}

void AnswerRenewal(const Fd &connection) {
  const Result<Frame> request = ReceiveRequest(connection);
  ASSERT_TRUE(request.ok());
  ASSERT_TRUE(SendFrame(connection.get(), MessageType::kRenewed, request.value().seq, Encode(Renewed{}), Soon()).ok());
}

// Before the greeting as after it, and at once the first time: that a connection has gone may be old news. The pauses
// after that are 50, 100 and 200 ms. Whose time is over is told of them.
TEST(ChannelClient, SendsAgainWhatIsLostWithItsConnection) {
  const BareServer server;
  ClientEnd client;
  const uint64_t sent = client.Send(server.port(), Renew{});
  const auto started = std::chrono::steady_clock::now();
  for (int i = 0; i < 2; ++i) {
    ASSERT_TRUE(ReceiveRequest(server.Welcome()).ok());
    ASSERT_TRUE(server.Accept());
  }
  Fd connection = server.Welcome();
  EXPECT_GE(std::chrono::steady_clock::now() - started, milliseconds(350));
  AnswerRenewal(connection);
  EXPECT_TRUE(std::holds_alternative<Renewed>(client.Wait(sent).answer));
  const uint64_t next = client.Send(server.port(), Renew{}, milliseconds(2000));
  ASSERT_TRUE(ReceiveRequest(connection).ok());
  connection.Reset();
  const Fd silent = server.Welcome();
  const std::string error = std::get<NoAnswer>(client.Wait(next).answer).error;
  EXPECT_NE(error.find("did not answer in time; connections that it ended: 1 ("), std::string::npos)
      << "they are counted from the last answer: " << error;
}

// One that ended a connection, and is gone when it is dialled again.
TEST(ChannelClient, WaitsForNobodyWhoHasGone) {
  auto server = std::make_unique<BareServer>();
  ClientEnd client;
  const uint64_t sent = client.Send(server->port(), Renew{});
  const Fd connection = server->Welcome();
  server.reset();
  ASSERT_TRUE(ReceiveRequest(connection).ok());
  ::shutdown(connection.get(), SHUT_RDWR);
  const NoAnswer none = std::get<NoAnswer>(client.Wait(sent).answer);
  EXPECT_NE(none.error.find("refused"), std::string::npos) << none.error;
  EXPECT_FALSE(none.timed_out);
}

struct BadAnswer {
  const char *name;
  MessageType type;
  uint32_t seq;  // the request's is 1
  std::vector<uint8_t> body;
};

class BadAnswers : public ::testing::TestWithParam<BadAnswer> {};

TEST_P(BadAnswers, FailWhatIsOutstandingAndAreNotAskedForAgain) {
  const BareServer server;
  ClientEnd client;
  const std::vector<uint64_t> sent = {client.Send(server.port(), Renew{}), client.Send(server.port(), Renew{})};
  const Fd connection = server.Welcome();
  for (size_t i = 0; i < sent.size(); ++i) {
    ASSERT_TRUE(ReceiveRequest(connection).ok());
  }
  ASSERT_TRUE(SendFrame(connection.get(), GetParam().type, GetParam().seq, GetParam().body, Soon()).ok());
  for (const uint64_t id : sent) {
    const ChannelAnswer answer = client.Wait(id);
    ASSERT_TRUE(std::holds_alternative<NoAnswer>(answer.answer));
    EXPECT_FALSE(std::get<NoAnswer>(answer.answer).timed_out);
  }
  const uint64_t next = client.Send(server.port(), Release{});
  const Result<Frame> request = ReceiveRequest(server.Welcome());
  ASSERT_TRUE(request.ok());
  EXPECT_EQ(request.value().type, MessageType::kRelease);
  (void)next;
}

INSTANTIATE_TEST_SUITE_P(
    All, BadAnswers,
    ::testing::Values(BadAnswer{"NobodysSeq", MessageType::kRenewed, 99, Encode(Renewed{})},
                      BadAnswer{"OfAnotherKind", MessageType::kReleased, 1, {}},
                      BadAnswer{"ARequest", MessageType::kRenew, 1, Encode(Renew{})},
                      BadAnswer{"Malformed", MessageType::kRenewed, 1, {1, 0, 0, 0}},
                      BadAnswer{"Unasked", MessageType::kRank, 1, std::vector<uint8_t>(100'000)}),
    [](const auto &test) { return std::string(test.param.name); });

// Both kinds are asked for, and each of the other request.
TEST(ChannelClient, TakesNoAnswerOfOneRequestForThatOfAnother) {
  const BareServer server;
  ClientEnd client;
  const uint64_t renewal = client.Send(server.port(), Renew{});
  const uint64_t release = client.Send(server.port(), Release{});
  const Fd connection = server.Welcome();
  ASSERT_TRUE(ReceiveRequest(connection).ok() && ReceiveRequest(connection).ok());
  ASSERT_TRUE(SendFrame(connection.get(), MessageType::kReleased, 1, {}, Soon()).ok());
  for (const uint64_t id : {renewal, release}) {
    EXPECT_TRUE(std::holds_alternative<NoAnswer>(client.Wait(id).answer));
  }
}

// A peer's text is one line of UTF-8.
TEST(ChannelClient, TellsTextsOfServersAsData) {
  const BareServer server;
  ClientEnd client;
  const uint64_t sent = client.Send(server.port(), AskRank(0));
  const Fd connection = server.Welcome();
  ASSERT_TRUE(ReceiveRequest(connection).ok());
  std::vector<uint8_t> body = Encode(RankAnswer{Invalid("xxxx"), {}});
  body[6] = 0xFF;
  body[7] = '\n';
  ASSERT_TRUE(SendFrame(connection.get(), MessageType::kRank, 1, body, Soon()).ok());
  EXPECT_EQ(std::get<RankAnswer>(client.Wait(sent).answer).status.text(), "? xx");
}

// An answer that comes too late is nobody's, and costs the others nothing.
TEST(ChannelClient, DropsAnswersThatComeTooLate) {
  const BareServer server;
  ClientEnd client;
  const uint64_t late = client.Send(server.port(), Renew{}, milliseconds(1000));
  const uint64_t waiting = client.Send(server.port(), Renew{});
  const Fd connection = server.Welcome();
  EXPECT_TRUE(std::get<NoAnswer>(client.Wait(late).answer).timed_out);
  for (int i = 0; i < 2; ++i) {
    const Result<Frame> request = ReceiveRequest(connection);
    ASSERT_TRUE(request.ok());
    ASSERT_TRUE(
        SendFrame(connection.get(), MessageType::kRenewed, request.value().seq, Encode(Renewed{}), Soon()).ok());
  }
  EXPECT_TRUE(std::holds_alternative<Renewed>(client.Wait(waiting).answer));
}

TEST(ChannelClient, KeepsNoMoreServersThanItMayAndNoneThatItDoesNotUse) {
  const std::vector<ServerEnd> servers(3);
  ClientEnd client(ChannelClientLimits{2, milliseconds(50)});
  const BareServer silent;
  const uint64_t busy = client.Send(silent.port(), Renew{});
  EXPECT_EQ(client.Failure(servers[0].port()), "");
  const std::string failure = client.Failure(servers[1].port());
  EXPECT_TRUE(failure.empty() || failure.find("more than 2 channels are open") != std::string::npos) << failure;
  const Fd connection = silent.Accept();  // the first has been unused for a while, or will be
  std::string last = "not asked";
  for (const auto end = std::chrono::steady_clock::now() + kLong;
       !last.empty() && std::chrono::steady_clock::now() < end;) {
    last = client.Failure(servers[2].port());
  }
  EXPECT_EQ(last, "");
  (void)busy;
}

TEST(ChannelClient, RefusesToBeMoreThanItMay) {
  const std::vector<BareServer> silent(3);
  ClientEnd client(ChannelClientLimits{2, milliseconds(50)});
  (void)client.Send(silent[0].port(), Renew{});
  (void)client.Send(silent[1].port(), Renew{});
  EXPECT_NE(client.Failure(silent[2].port()).find("more than 2 channels are open"), std::string::npos);
}

TEST(ChannelClient, ClosesAConnectionThatIsIdle) {
  const BareServer server;
  ClientEnd client(ChannelClientLimits{2, milliseconds(50)});
  const uint64_t sent = client.Send(server.port(), Release{});
  const Fd connection = server.Welcome();
  ASSERT_TRUE(ReceiveRequest(connection).ok());
  ASSERT_TRUE(SendFrame(connection.get(), MessageType::kReleased, 1, {}, Soon()).ok());
  EXPECT_TRUE(std::holds_alternative<Released>(client.Wait(sent).answer));
  EXPECT_EQ(ReceiveRequest(connection).status().code(), llm_datadist::LLM_FAILED) << "not closed";
}

TEST(ChannelClient, IsToldOfOtherVersions) {
  ServerEnd server;
  ClientEnd client({}, Anybody(), kContentVersion + 1);
  const std::string failure = client.Failure(server.port());
  EXPECT_NE(failure.find("connector protocol versions differ: client 4, server 3"), std::string::npos) << failure;
}

// Over TCP nobody says who is there.
TEST(ChannelClient, ProvesTheKeyOverTcp) {
  const KeyFile keys(KeyLine('1'));
  const KeyFile others(KeyLine('2'));
  const auto with = [](const KeyFile &file) { return Trust{KeyRing::FromFile(file.path()).value(), false}; };
  ServerEnd server({}, 0, with(keys));
  const LeaseTable::Ticket ticket = server.Grant();
  const ChoppingProxy proxy(server.port(), ~uint64_t{0});
  ClientEnd friendly({}, with(keys));
  for (int i = 0; i < 3; ++i) {
    const ChannelAnswer answer = friendly.Ask(proxy.port(), Renew{{ticket.token}});
    ASSERT_TRUE(std::holds_alternative<Renewed>(answer.answer));
    EXPECT_TRUE(std::get<Renewed>(answer.answer).gone.empty());
  }
  EXPECT_NE(ClientEnd({}, with(others)).Failure(proxy.port()).find("no key in common"), std::string::npos);
  EXPECT_NE(ClientEnd({}, Trust{}).Failure(proxy.port()).find("over TCP nobody says"), std::string::npos);
  EXPECT_NE(ClientEnd({}, Anybody()).Failure(proxy.port()).find("a key (auth) is asked for"), std::string::npos);
  EXPECT_EQ(ClientEnd({}, Trust{}).Failure(server.port()), "") << "within the host the kernel says who is there";
}

TEST(ChannelClient, ClosesWithoutWaiting) {
  const BareServer silent;
  const auto started = std::chrono::steady_clock::now();
  {
    ClientEnd client;
    (void)client.Send(silent.port(), Renew{});
    client.client->Close();
    client.client->Close();
    EXPECT_NE(client.Failure(silent.port()).find("closed"), std::string::npos);
  }
  EXPECT_LT(std::chrono::steady_clock::now() - started, kLong / 2);
}

TEST(ChannelEnds, AreNotTheForkedChilds) {
  auto server = std::make_unique<ServerEnd>();
  auto client = std::make_unique<ClientEnd>();
  EXPECT_EQ(client->Failure(server->port()), "");
  const pid_t child = ::fork();
  if (child == 0) {
    const bool known = client->client->in_forked_child() && server->server->in_forked_child();
    client.reset();
    server.reset();
    ::_exit(known ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(client->Failure(server->port()), "");
}

}  // namespace
}  // namespace datadist::testing
