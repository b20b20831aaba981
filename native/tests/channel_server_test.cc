// The server of the channel among clients that mean it harm: a healthy one is answered all the while, and what the others
// can make grow has its limit.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "support/channel_ends.h"

namespace datadist::testing {
namespace {

using std::chrono::milliseconds;

// Sanitizers keep memory of their own beside each byte.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kMemoryIsOurs = false;
#else
constexpr bool kMemoryIsOurs = true;
#endif

size_t ResidentBytes() {
  size_t size = 0;
  size_t resident = 0;
  std::ifstream("/proc/self/statm") >> size >> resident;
  return resident * static_cast<size_t>(::sysconf(_SC_PAGESIZE));
}

std::vector<uint8_t> Raw(MessageType type, const std::vector<uint8_t> &body, size_t keep) {
  std::vector<uint8_t> bytes = EncodeFrame(type, 1, body);
  bytes.resize(std::min(bytes.size(), keep));
  return bytes;
}

TEST(ChannelServer, TellsAClientOfAnotherVersionBoth) {
  ServerEnd server;
  BareClient client(server.port());
  // Of a version to come: its greeting may be longer, and begins the same.
  std::vector<uint8_t> body = Encode(ChannelGreeting{{90, 91}, 5});
  body.push_back(1);
  ASSERT_TRUE(client.Send(MessageType::kChannel, body).ok());
  const Result<Frame> reject = client.Receive();
  ASSERT_TRUE(reject.ok());
  const std::string text = Decode<Reject>(reject.value().body).value().status.text();
  EXPECT_NE(text.find("client 90..91, server " + std::to_string(kProtocolVersion)), std::string::npos) << text;
  EXPECT_TRUE(client.IsCutOff());
}

struct HostileFrame {
  const char *name;
  std::vector<uint8_t> bytes;
};

std::vector<HostileFrame> HostileFrames() {
  const std::vector<uint8_t> renew = Encode(Renew{{LeaseToken{1}}});
  std::vector<uint8_t> flipped = EncodeFrame(MessageType::kRenew, 1, renew);
  flipped.back() ^= 1;
  std::vector<uint8_t> text(64, 'A');
  // A header alone: what it announces is refused before any of it has come.
  const std::vector<uint8_t> large = Raw(MessageType::kRenew, std::vector<uint8_t>(kMaxFrameBody), kFrameHeaderSize);
  // Whoever loads it is gone.
  std::vector<uint8_t> pickle = {'c', 'p', 'o', 's', 'i', 'x', '\n', '_', 'e', 'x', 'i', 't', '\n', '(', 'I', '9', '\n', 't', 'R', '.'};
  return {{"Text", text},
          {"Pickle", pickle},
          {"WrongChecksum", flipped},
          {"AnnouncesAMebibyte", large},
          {"MalformedDescribeRank", EncodeFrame(MessageType::kDescribeRank, 1, {1})},
          {"MalformedRenew", EncodeFrame(MessageType::kRenew, 1, {255, 255, 255, 255})},
          {"MalformedConfirm", EncodeFrame(MessageType::kConfirm, 1, {})},
          {"MalformedRelease", EncodeFrame(MessageType::kRelease, 1, {1, 0, 0, 0})},
          {"MalformedAwait", EncodeFrame(MessageType::kAwait, 1, {1})},
          {"MalformedReport", EncodeFrame(MessageType::kReport, 1, {1})},
          {"ReportWithoutTheKey", EncodeFrame(MessageType::kReport, 1, Encode(ReportProgress{}))},
          {"MalformedOffer", EncodeFrame(MessageType::kOffer, 1, {1})},
          {"MalformedWatch", EncodeFrame(MessageType::kWatch, 1, {1})},
          {"WatchWithoutTheKey", EncodeFrame(MessageType::kWatch, 1, Encode(Watch{}))},
          {"MalformedSwitch", EncodeFrame(MessageType::kSwitch, 1, {1})},
          {"DeclareWithoutTheKey", EncodeFrame(MessageType::kDeclare, 1, Encode(Declare{}))},
          {"MalformedDeliver", EncodeFrame(MessageType::kDeliver, 1, {1})},
          {"DeliverWithoutTheKey", EncodeFrame(MessageType::kDeliver, 1, Encode(Deliver{{}, {}, {}, 1, {}}))},
          {"SecondGreeting", EncodeFrame(MessageType::kChannel, 1, Encode(ChannelGreeting{}))},
          {"AnAnswer", EncodeFrame(MessageType::kRenewed, 1, renew)},
          {"OfTheLinks", EncodeFrame(MessageType::kHello, 1, {})},
          {"Ping", EncodeFrame(MessageType::kPing, 1, {})}};
}

class HostileFramesTest : public ::testing::TestWithParam<HostileFrame> {};

TEST_P(HostileFramesTest, EndTheirConnectionBeforeAndAfterTheGreeting) {
  ServerEnd server;
  ClientEnd healthy;
  EXPECT_EQ(healthy.Failure(server.port()), "");
  BareClient stranger(server.port());
  stranger.SendBytes(GetParam().bytes);
  if (std::string(GetParam().name) != "SecondGreeting") {
    EXPECT_TRUE(stranger.IsCutOff()) << "before";
  }
  BareClient guest(server.port());
  ASSERT_TRUE(guest.Greet());
  guest.SendBytes(GetParam().bytes);
  EXPECT_TRUE(guest.IsCutOff()) << "after";
  EXPECT_EQ(healthy.Failure(server.port()), "");
}

INSTANTIATE_TEST_SUITE_P(All, HostileFramesTest, ::testing::ValuesIn(HostileFrames()),
                         [](const auto &test) { return std::string(test.param.name); });

// Nobody is let in, or answered, who has not said what it wants.
TEST(ChannelServer, AnswersNobodyBeforeTheGreeting) {
  ServerEnd server;
  BareClient client(server.port());
  ASSERT_TRUE(client.Send(MessageType::kRenew, Encode(Renew{})).ok());
  EXPECT_FALSE(client.Receive().ok());
}

TEST(ChannelServer, LetsInNobodyOverTcpWithoutAKeyOrLeave) {
  ServerEnd server({}, 0, Trust{});
  EXPECT_FALSE(BareClient(server.port()).Greet());
  EXPECT_FALSE(ChannelServer::Create(SocketAddress::FromIp("0.0.0.0", 0).value(), TheGrantor(), Trust{},
                                     server.leases, {})
                   .ok());
}

TEST(ChannelServer, StrangersGuessNoTokens) {
  ServerEnd server;
  for (int i = 0; i < 256; ++i) {
    (void)server.Grant(std::to_string(i));
  }
  BareClient stranger(server.port());
  ASSERT_TRUE(stranger.Greet());
  std::mt19937_64 random(1);  // NOLINT: the same guesses each time
  for (int i = 0; i < 20; ++i) {
    std::vector<LeaseToken> guesses(kMaxLeasesPerMessage);
    for (LeaseToken &guess : guesses) {
      for (uint8_t &byte : guess) {
        byte = static_cast<uint8_t>(random());
      }
    }
    ASSERT_TRUE(stranger.Send(MessageType::kRenew, Encode(Renew{guesses})).ok());
    const Result<Frame> answer = stranger.Receive();
    ASSERT_TRUE(answer.ok());
    EXPECT_EQ(Decode<Renewed>(answer.value().body).value().gone, guesses);
    ASSERT_TRUE(stranger.Send(MessageType::kRelease, Encode(Release{guesses})).ok());
    ASSERT_TRUE(stranger.Receive().ok());
    ASSERT_TRUE(stranger.Send(MessageType::kConfirm, Encode(Confirm{guesses[0], 1, {{1}, {2}}})).ok());
    const Result<Frame> verdict = stranger.Receive();
    ASSERT_TRUE(verdict.ok());
    EXPECT_EQ(Decode<Confirmed>(verdict.value().body).value().verdict, LeaseVerdict::kGone);
  }
  EXPECT_EQ(server.leases->held().leases, 256U);
  EXPECT_TRUE(server.leases->TakeEnded().empty());
}

// One that begins a frame and does not end it, whether it says no more or drips, has so long and no longer.
TEST(ChannelServer, EndsWhatDoesNotFinishItsFrame) {
  ServerEnd server(ChannelLimits{1024, 64U << 20, milliseconds(300), kLong * 10});
  ClientEnd healthy;
  BareClient resting(server.port());
  BareClient silent(server.port());
  BareClient dripping(server.port());
  ASSERT_TRUE(resting.Greet() && silent.Greet() && dripping.Greet());
  const std::vector<uint8_t> begun = Raw(MessageType::kRenew, Encode(Renew{std::vector<LeaseToken>(4096)}), 60'000);
  silent.SendBytes(begun);
  std::atomic<bool> over{false};
  std::thread drips([&] {
    for (size_t i = 0; !over && ::send(dripping.fd.get(), &begun[i], 1, MSG_NOSIGNAL) == 1; ++i) {
      std::this_thread::sleep_for(milliseconds(20));
    }
  });
  EXPECT_TRUE(silent.IsCutOff());
  EXPECT_TRUE(dripping.IsCutOff());
  over = true;
  drips.join();
  EXPECT_EQ(healthy.Failure(server.port()), "");
  ASSERT_TRUE(resting.Send(MessageType::kRenew, Encode(Renew{})).ok());
  EXPECT_TRUE(resting.Receive().ok()) << "one that has not begun a frame is none of these";
}

TEST(ChannelServer, EndsGuestsThatAreIdle) {
  ServerEnd server(ChannelLimits{1024, 64U << 20, kLong * 10, milliseconds(2000)});
  BareClient idle(server.port());
  BareClient asking(server.port());
  ASSERT_TRUE(idle.Greet() && asking.Greet());
  std::atomic<bool> over{false};
  std::thread asks([&] {
    while (!over) {
      EXPECT_TRUE(asking.Send(MessageType::kRenew, Encode(Renew{})).ok());
      EXPECT_TRUE(asking.Receive().ok());
      std::this_thread::sleep_for(milliseconds(50));
    }
  });
  EXPECT_TRUE(idle.IsCutOff());
  over = true;
  asks.join();
  EXPECT_TRUE(asking.Send(MessageType::kRenew, Encode(Renew{})).ok());
  EXPECT_TRUE(asking.Receive().ok()) << "one that asks is not idle";
}

// More than may be guests: whoever has the most makes room, so the others are answered over the connections that they had.
TEST(ChannelServer, IsNotFilledByOneSource) {
  ServerEnd server(ChannelLimits{32, 64U << 20, kLong * 10, kLong * 10});
  ClientEnd healthy;
  EXPECT_EQ(healthy.Failure(server.port()), "");
  std::vector<std::unique_ptr<BareClient>> flood;
  for (int i = 0; i < 1000; ++i) {
    flood.push_back(std::make_unique<BareClient>(server.port()));
    ASSERT_TRUE(flood.back()->Greet()) << i;
    if (i % 100 == 0) {
      EXPECT_EQ(healthy.Failure(server.port()), "");
    }
  }
  EXPECT_TRUE(flood.front()->IsCutOff());
  ASSERT_TRUE(flood.back()->Send(MessageType::kRenew, Encode(Renew{})).ok());
  EXPECT_TRUE(flood.back()->Receive().ok()) << "the one that was silent longest goes, not the newest";
  EXPECT_EQ(healthy.Failure(server.port()), "");
}

// The healthy client's connection is the oldest and the most silent one here: it stays all the same.
TEST(ChannelServer, TakesRoomFromWhoHasTheMost) {
  ServerEnd server(ChannelLimits{8, 64U << 20, kLong * 10, kLong * 10});
  Fd healthy = std::move(TryLocal(Loopback(server.port())).connection.fd);
  const ChannelGreeting greeting{{kProtocolVersion, kProtocolVersion}, kContentVersion};
  ASSERT_TRUE(SendFrame(healthy.get(), MessageType::kChannel, 1, Encode(greeting), Soon()).ok());
  ASSERT_TRUE(RecvFrame(healthy.get(), kAnyAnswer, Soon()).ok());
  std::vector<std::unique_ptr<BareClient>> flood;
  for (int i = 0; i < 50; ++i) {
    flood.push_back(std::make_unique<BareClient>(server.port()));
    ASSERT_TRUE(flood.back()->Greet()) << i;
  }
  ASSERT_TRUE(SendFrame(healthy.get(), MessageType::kRenew, 2, Encode(Renew{}), Soon()).ok());
  EXPECT_TRUE(RecvFrame(healthy.get(), kAnyAnswer, Soon()).ok());
}

// The process needs descriptors for other things, too.
TEST(ChannelServer, LeavesDescriptorsToTheRestOfTheProcess) {
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  const rlimit few{64, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &few), 0);
  ServerEnd server;
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);
  std::vector<std::unique_ptr<BareClient>> flood;
  for (int i = 0; i < 33; ++i) {
    flood.push_back(std::make_unique<BareClient>(server.port()));
    ASSERT_TRUE(flood.back()->Greet()) << i;
  }
  EXPECT_TRUE(flood.front()->IsCutOff());
}

// Thousands of connections that each announce the most that they may and send nearly all of it.
TEST(ChannelServer, UnfinishedFramesCostLittle) {
  ServerEnd server;
  ClientEnd healthy;
  EXPECT_EQ(healthy.Failure(server.port()), "");
  const size_t before = ResidentBytes();
  const std::vector<uint8_t> begun =
      Raw(MessageType::kRenew, Encode(Renew{std::vector<LeaseToken>(kMaxLeasesPerMessage)}), 60'000);
  std::vector<std::unique_ptr<BareClient>> flood;
  for (int i = 0; i < 2000; ++i) {
    flood.push_back(std::make_unique<BareClient>(server.port()));
    ASSERT_TRUE(flood.back()->Greet()) << i;
    flood.back()->SendBytes(begun);
    if (i % 100 == 0) {
      EXPECT_EQ(healthy.Failure(server.port()), "");
    }
  }
  EXPECT_EQ(healthy.Failure(server.port()), "");
  // Of 1024 guests a buffer each that has doubled up to one such message.
  EXPECT_TRUE(!kMemoryIsOurs || ResidentBytes() - before < size_t{160} << 20);
}

// Asks for the largest answers, and reads none of them: of each guest one is kept at most, and of all together so much.
TEST(ChannelServer, AnswersThatNobodyReadsAreBounded) {
  constexpr size_t kUnsent = 4U << 20;
  constexpr size_t kFlood = 48;
  ServerEnd server(ChannelLimits{1024, kUnsent, kLong * 10, kLong * 10});
  ASSERT_TRUE(server.server->SetGeometries({{{0, 0}, std::vector<uint8_t>(kMaxGeometry)}}).ok());
  ClientEnd healthy;
  EXPECT_EQ(healthy.Failure(server.port()), "");
  const size_t before = ResidentBytes();
  std::vector<std::unique_ptr<BareClient>> flood;
  const std::vector<uint8_t> ask = EncodeFrame(MessageType::kDescribeRank, 1, Encode(AskRank(0)));
  std::vector<uint8_t> asks;
  for (int i = 0; i < 64; ++i) {
    asks.insert(asks.end(), ask.begin(), ask.end());
  }
  for (size_t i = 0; i < kFlood; ++i) {
    flood.push_back(std::make_unique<BareClient>(server.port()));
    const int small = 4096;
    ::setsockopt(flood.back()->fd.get(), SOL_SOCKET, SO_RCVBUF, &small, sizeof(small));
    ASSERT_TRUE(flood.back()->Greet()) << i;
    flood.back()->SendBytes(asks);
    EXPECT_EQ(healthy.Failure(server.port()), "");
  }
  EXPECT_TRUE(!kMemoryIsOurs || ResidentBytes() - before < kFlood * kMaxGeometry / 2);
  const auto cut_off = std::count_if(flood.begin(), flood.end(), [](const auto &guest) {
    pollfd end{guest->fd.get(), 0, 0};
    return ::poll(&end, 1, 0) == 1;
  });
  EXPECT_GT(cut_off, 0);
  const ChannelAnswer answer = healthy.Ask(server.port(), AskRank(0));
  EXPECT_EQ(std::get<RankAnswer>(answer.answer).geometry.size(), kMaxGeometry);
}

TEST(ChannelServer, EndsWhoDoesNotRead) {
  ServerEnd server(ChannelLimits{1024, 64U << 20, milliseconds(300), kLong * 10});
  ASSERT_TRUE(server.server->SetGeometries({{{0, 0}, std::vector<uint8_t>(kMaxGeometry)}}).ok());
  BareClient client(server.port());
  ASSERT_TRUE(client.Greet());
  for (int i = 0; i < 64; ++i) {
    ASSERT_TRUE(client.Send(MessageType::kDescribeRank, Encode(AskRank(0))).ok());
  }
  // Cut off while it reads nothing: a connection with bytes that nobody read ends with a reset.
  pollfd end{client.fd.get(), 0, 0};
  EXPECT_EQ(::poll(&end, 1, static_cast<int>(milliseconds(kLong).count())), 1);
}

// Many requests at once from one that reads are no attack.
TEST(ChannelServer, AnswersAllThatOneClientAsksAtOnce) {
  ServerEnd server;
  ASSERT_TRUE(server.server->SetGeometries({{{0, 0}, std::vector<uint8_t>(kMaxGeometry, 5)}}).ok());
  ClientEnd client;
  std::vector<uint64_t> ranks;
  std::vector<uint64_t> renewals;
  for (int i = 0; i < 20; ++i) {
    ranks.push_back(client.Send(server.port(), AskRank(0)));
    renewals.push_back(client.Send(server.port(), Renew{std::vector<LeaseToken>(kMaxLeasesPerMessage)}));
  }
  for (const uint64_t id : ranks) {
    const ChannelAnswer answer = client.Wait(id);
    ASSERT_TRUE(std::holds_alternative<RankAnswer>(answer.answer)) << std::get<NoAnswer>(answer.answer).error;
    EXPECT_EQ(std::get<RankAnswer>(answer.answer).geometry.size(), kMaxGeometry);
  }
  for (const uint64_t id : renewals) {
    EXPECT_EQ(std::get<Renewed>(client.Wait(id).answer).gone.size(), kMaxLeasesPerMessage);
  }
}

TEST(ChannelServer, GeometriesThatNoMessageHasRoomForAreRefused) {
  ServerEnd server;
  const Status status = server.server->SetGeometries({{{0, 1}, std::vector<uint8_t>(kMaxGeometry + 1)}});
  EXPECT_EQ(status.code(), llm_datadist::LLM_PARAM_INVALID);
  EXPECT_NE(status.text().find("(0, 1)"), std::string::npos);
}

TEST(ChannelServer, TellsWhoHasLeft) {
  ChannelLimits limits;
  limits.grace = milliseconds(0);
  ServerEnd server(limits);
  ASSERT_TRUE(server.server->SetGeometries({{{0, 0}, {1}}}).ok());
  const auto wait_for = [&](const std::vector<uint64_t> &left) {
    std::vector<uint64_t> told;
    for (const Deadline deadline = Soon(); told.size() < left.size() && !deadline.Expired();) {
      const std::vector<uint64_t> more = server.server->TakeLeftAskers();
      told.insert(told.end(), more.begin(), more.end());
    }
    EXPECT_EQ(told, left);
  };
  auto first = std::make_unique<ClientEnd>();
  ClientEnd second;
  first->Ask(server.port(), AskRank(0, 5));
  second.Ask(server.port(), AskRank(0, 5));
  first.reset();
  ClientEnd nobody;
  nobody.Ask(server.port(), AskRank(0));
  nobody.Ask(server.port(), AskRank(1, 9));  // refused: it will not link
  EXPECT_TRUE(server.server->TakeLeftAskers().empty()) << "one of two connections";
  second.Ask(server.port(), AskRank(0, 6));  // whatever a connection says, it is of one cluster
  wait_for({5});
  second.client->Close();
  nobody.client->Close();
  wait_for({6});
  EXPECT_TRUE(server.server->TakeLeftAskers().empty());
}

TEST(ChannelServer, GivesItsAddressBack) {
  uint16_t port = 0;
  for (int i = 0; i < 3; ++i) {
    ServerEnd server({}, port);
    port = server.port();
    BareClient guest(port);
    BareClient visitor(port);
    ASSERT_TRUE(guest.Greet());
    const auto taken = ChannelServer::Create(Loopback(port), TheGrantor(), Anybody(), server.leases);
    ASSERT_FALSE(taken.ok());
    EXPECT_NE(taken.status().text().find(std::to_string(port)), std::string::npos);
    server.server->Close();
    server.server->Close();
    EXPECT_TRUE(guest.IsCutOff());
    EXPECT_TRUE(visitor.IsCutOff());
  }
}

}  // namespace
}  // namespace datadist::testing
