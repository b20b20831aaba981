// Who is let in over TCP, where no kernel says who is there: whoever knows the key, and nobody by what he has overheard.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/random.h"
#include "control/opening.h"
#include "support/chopping_proxy.h"
#include "support/frames.h"
#include "support/key_file.h"
#include "support/member.h"
#include "support/node.h"

namespace datadist::testing {
namespace {

using ::testing::HasSubstr;
using llm_datadist::LLM_LINK_FAILED;
using llm_datadist::LLM_PARAM_INVALID;
using llm_datadist::LLM_SUCCESS;

Deadline Soon() { return Deadline::In(kPatience); }

LinkOptions WithKey(const KeyFile &file) {
  LinkOptions options;
  options.trust.keys = KeyRing::FromFile(file.path()).value();
  return options;
}

void ExpectTransfers(Member &client, Member &server) {
  const int64_t remote = server.AddCache(5);
  const int64_t local = client.AddCache(6);
  ASSERT_TRUE(client.Pull(server.id(), remote, local, 0, 0, Member::kShape.num_blocks).ok());
  EXPECT_EQ(client.Bytes(local), server.Bytes(remote));
}

TEST(Auth, LinksAndMovesBytesBetweenThoseWhoShareAKey) {
  const KeyFile file(KeyLine('1'));
  Member server(2, WithKey(file));
  Member client(1, WithKey(file));
  ASSERT_TRUE(client.Dial(server.Listen(false), 2).ok());
  EXPECT_EQ(client.table()->Find(2)->Report().transport, "tcp");
  ExpectTransfers(client, server);
  EXPECT_TRUE(client.Unlink(2).ok());
}

TEST(Auth, IsNotAskedOfWhomTheKernelNames) {
  const KeyFile file(KeyLine('1'));
  Member server(2, WithKey(file));
  Member client(1);
  EXPECT_TRUE(client.Dial(server.Listen(), 2).ok());
}

struct Disagreement {
  const char *client;  // a line of the key file, "insecure" or "nothing"
  const char *server;
  const char *said;
};

class AuthBetween : public ::testing::TestWithParam<Disagreement> {};

TEST_P(AuthBetween, EndsThatDoNotAgreeAreRefusedInWords) {
  const auto options = [](const std::string &what) {
    LinkOptions made;
    made.trust.insecure = what == "insecure";
    if (what.size() == 1) {
      made.trust.keys = KeyRing::FromFile(KeyFile(KeyLine(what[0])).path()).value();
    }
    return made;
  };
  Member server(2, options(GetParam().server));
  Member client(1, options(GetParam().client));
  const Status status = client.Dial(server.Listen(false), 2);
  EXPECT_EQ(status.code(), LLM_LINK_FAILED);
  EXPECT_THAT(status.text(), HasSubstr(GetParam().said));
  EXPECT_TRUE(client.table()->Empty());
  EXPECT_TRUE(server.table()->Empty());
}

INSTANTIATE_TEST_SUITE_P(
    Ends, AuthBetween,
    ::testing::Values(Disagreement{"1", "2", "no key in common"},
                      Disagreement{"1", "insecure", "there is no key (auth) at this end"},
                      Disagreement{"1", "nothing", "over TCP nobody says who is there"},
                      Disagreement{"insecure", "1", "a key (auth) is asked for, and the peer has none"},
                      Disagreement{"nothing", "1", "over TCP nobody says who is there"},
                      Disagreement{"insecure", "nothing", "over TCP nobody says who is there"},
                      Disagreement{"nothing", "insecure", "over TCP nobody says who is there"},
                      Disagreement{"nothing", "nothing", "over TCP nobody says who is there"}));

// Speaks the opening by hand, and knows what travels over the wire, but not the key.
class Eavesdropper {
 public:
  explicit Eavesdropper(const SocketAddress &address) : fd_(DialTcp(address, Soon()).value()) {}

  std::vector<uint8_t> Open(std::vector<Key> keys) {
    ClientOpening opening(std::move(keys));
    return Ask(MessageType::kOpen, opening.Open().value(), MessageType::kOpened);
  }
  std::vector<uint8_t> Ask(MessageType type, const std::vector<uint8_t> &body, MessageType answer) {
    EXPECT_TRUE(SendFrame(fd_.get(), type, 1, body, Soon()).ok());
    const Result<Frame> frame = RecvFrame(fd_.get(), TypeSet(answer), Soon());
    EXPECT_TRUE(frame.ok()) << frame.status().text();
    return frame.ok() ? frame.value().body : std::vector<uint8_t>();
  }
  // Well before the five seconds are over that a handshake has.
  bool IsTurnedAwayAfter(MessageType type, const std::vector<uint8_t> &body) {
    char byte = 0;
    return SendFrame(fd_.get(), type, 2, body, Soon()).ok() &&
           RecvAll(fd_.get(), &byte, 1, Deadline::In(std::chrono::seconds(3))).code() == llm_datadist::LLM_FAILED;
  }

 private:
  Fd fd_;
};

// The server's own proof, sent back; somebody else's proof; none.
TEST(Auth, ProofsOfOthersAreNone) {
  const KeyFile file(KeyLine('1'));
  Member server(2, WithKey(file));
  const SocketAddress address = server.Listen(false);
  const std::vector<Key> keys = KeyRing::FromFile(file.path()).value()->Keys();
  const auto proof_in = [](const std::vector<uint8_t> &opened) {
    return std::vector<uint8_t>(opened.end() - static_cast<std::ptrdiff_t>(sizeof(Digest)), opened.end());
  };
  Eavesdropper mirror(address);
  EXPECT_TRUE(mirror.IsTurnedAwayAfter(MessageType::kProve, proof_in(mirror.Open(keys))));

  ClientOpening genuine(keys);
  Eavesdropper first(address);
  const auto opened = first.Ask(MessageType::kOpen, genuine.Open().value(), MessageType::kOpened);
  const std::vector<uint8_t> proof = genuine.OnOpened(opened).value();
  Eavesdropper replay(address);
  replay.Open(keys);
  EXPECT_TRUE(replay.IsTurnedAwayAfter(MessageType::kProve, proof));

  Eavesdropper silent(address);
  silent.Open(keys);
  EXPECT_TRUE(silent.IsTurnedAwayAfter(MessageType::kHello, {})) << "nothing before the proof";
}

// A server that names the key and does not know it learns nothing and is not believed.
TEST(Auth, AServerWithoutTheKeyIsNotBelieved) {
  const KeyFile file(KeyLine('1'));
  const std::vector<Key> keys = KeyRing::FromFile(file.path()).value()->Keys();
  ClientOpening client(keys);
  ServerOpening honest(keys);
  std::vector<uint8_t> opened = honest.OnOpen(client.Open().value()).value();
  for (const size_t byte : {size_t{8}, opened.size() - 1}) {  // in the nonce; in the proof
    std::vector<uint8_t> forged = opened;
    forged[byte] ^= 1;
    EXPECT_EQ(client.OnOpened(forged).status().code(), LLM_LINK_FAILED) << byte;
  }
  EXPECT_TRUE(client.OnOpened(opened).ok());
  const SessionKeys &ours = client.session();
  const SessionKeys &theirs = honest.session();
  EXPECT_EQ(ours.to_server, theirs.to_server);
  EXPECT_EQ(ours.to_client, theirs.to_client);
  EXPECT_NE(ours.to_server, ours.to_client) << "or frames could be sent back";
  EXPECT_NE(ours.to_server, ours.streams);
}

// Who has overheard the token of a link attaches no data connection to it.
TEST(Auth, ATokenAloneAttachesNothing) {
  const KeyFile file(KeyLine('1'));
  Member server(2, WithKey(file));
  const SocketAddress address = server.Listen(false);
  LinkOptions options = WithKey(file);
  OpenConnection control = DialOpen(address, options.trust, Soon()).value();
  Hello hello;
  hello.versions = {kProtocolVersion, kProtocolVersion};
  hello.client.cluster_id = 1;
  hello.client.role = 1;
  hello.client.transports = {{"tcp", {1, 0}}};
  hello.remaining_ms = 60000;
  const auto say = [&](MessageType type, const std::vector<uint8_t> &body, MessageType answer) {
    EXPECT_TRUE(SendFrame(control.socket, type, 1, body, Soon()).ok());
    return RecvFrame(control.socket, TypeSet(answer), Soon());
  };
  const Result<Frame> welcome = say(MessageType::kHello, Encode(hello), MessageType::kWelcome);
  ASSERT_TRUE(welcome.ok()) << welcome.status().text();
  ASSERT_TRUE(say(MessageType::kReady, Encode(Ready{"tcp", ""}), MessageType::kReady).ok());
  Attach attach{Decode<Welcome>(welcome.value().body).value().token, Initiator::kClient, 0, {}};
  EXPECT_TRUE(Eavesdropper(address).IsTurnedAwayAfter(MessageType::kAttach, Encode(attach)));
  attach.proof = ProofOf(control.streams, attach);
  attach.initiator = Initiator::kServer;
  EXPECT_TRUE(Eavesdropper(address).IsTurnedAwayAfter(MessageType::kAttach, Encode(attach))) << "for another place";
  attach.initiator = Initiator::kClient;
  Eavesdropper(address).Ask(MessageType::kAttach, Encode(attach), MessageType::kAttached);
}

TEST(Auth, OpeningsCutAtManyBytesLeaveNothing) {
  const KeyFile file(KeyLine('1'));
  Node server(2);
  Node client(1);
  ASSERT_EQ(server.Start(ServerOptions({{llm_datadist::OPTION_AUTH_KEY_FILE, file.path()}})), LLM_SUCCESS)
      << llm_datadist::GetLastErrorText();
  ASSERT_EQ(client.Start(ClientOptions({{llm_datadist::OPTION_AUTH_KEY_FILE, file.path()},
                                        {llm_datadist::OPTION_TRANSPORT, "tcp"}})),
            LLM_SUCCESS);
  for (uint64_t limit = 1;; limit += 11) {
    ChoppingProxy proxy(server.port(), limit);
    const auto status = client.Link(2, proxy.port(), 5000);
    if (status == LLM_SUCCESS) {
      EXPECT_GT(limit, 400U);
      break;
    }
    ASSERT_EQ(status, LLM_LINK_FAILED) << "cut after " << limit << ": " << llm_datadist::GetLastErrorText();
    ASSERT_LT(limit, 4000U) << llm_datadist::GetLastErrorText();
  }
}

// ---- key files ----

TEST(KeyFiles, AreReadAgainWhenTheyChange) {
  KeyFile servers(KeyLine('1'));
  KeyFile clients(KeyLine('1'));
  Member server(2, WithKey(servers));
  const SocketAddress address = server.Listen(false);
  Member client(1, WithKey(clients));
  const auto link = [&] {
    const Status status = client.Dial(address, 2);
    return status.ok() && client.Unlink(2).ok();
  };
  EXPECT_TRUE(link());
  servers.Write("# added first\n" + KeyLine('2') + "\n" + KeyLine('1'));
  EXPECT_TRUE(link()) << "the old one still holds";
  clients.Write(KeyLine('2'));
  EXPECT_TRUE(link());
  servers.Write(KeyLine('2'));
  EXPECT_TRUE(link());
  clients.Write(KeyLine('1'));
  EXPECT_FALSE(link()) << "taken out";
  clients.Write("no key\n");
  servers.Write(KeyLine('1'));
  EXPECT_TRUE(link()) << "a slip of the pen leaves the keys as they were read last";
}

struct BadFile {
  const char *text;
  mode_t mode;
  const char *said;
};

class BadKeyFiles : public ::testing::TestWithParam<BadFile> {};

TEST_P(BadKeyFiles, AreRefusedInWords) {
  const KeyFile file(GetParam().text, GetParam().mode);
  const Status status = KeyRing::FromFile(file.path()).status();
  EXPECT_EQ(status.code(), LLM_PARAM_INVALID);
  EXPECT_THAT(status.text(), HasSubstr("key file '" + file.path() + "': "));
  EXPECT_THAT(status.text(), HasSubstr(GetParam().said));
  EXPECT_EQ(status.text().find("aaaa"), std::string::npos) << "never what is in it";
}

const std::string kThree = KeyLine('1') + KeyLine('2') + KeyLine('3');
const std::string kShort = "# a comment\n\n" + KeyLine('1').substr(1);
const std::string kLong(5000, '#');

INSTANTIATE_TEST_SUITE_P(
    Files, BadKeyFiles,
    ::testing::Values(BadFile{"", 0600, "no key in it"}, BadFile{"# nothing\n\n", 0600, "no key in it"},
                      BadFile{kThree.c_str(), 0600, "line 3 is a third key"},
                      BadFile{kShort.c_str(), 0600, "line 3 is no key"},
                      BadFile{kLong.c_str(), 0600, "more than 4096 bytes"},
                      BadFile{"x\n", 0604, "mode 0604"}, BadFile{"x\n", 0620, "mode 0620"}));

TEST(KeyFiles, ThatAreNoFilesAreRefused) {
  EXPECT_THAT(KeyRing::FromFile("/nonexistent/key").status().text(), HasSubstr("No such file"));
  EXPECT_THAT(KeyRing::FromFile("/tmp").status().text(), HasSubstr("not a regular file"));
}

// ---- options ----

TEST(TrustOptions, AnAddressThatOthersReachNeedsAKeyOrLeave) {
  const KeyFile file(KeyLine('1'));
  const std::string everywhere = "0.0.0.0:0";
  const auto start = [&](TextOptions more) {
    more.emplace(llm_datadist::OPTION_LISTEN_IP_INFO, everywhere);
    return Node(1).Start(ClientOptions(more));
  };
  EXPECT_EQ(start({}), LLM_PARAM_INVALID);
  EXPECT_THAT(llm_datadist::GetLastErrorText(), HasSubstr("can be reached by other hosts"));
  EXPECT_EQ(start({{llm_datadist::OPTION_INSECURE, "1"}}), LLM_SUCCESS);
  EXPECT_EQ(start({{llm_datadist::OPTION_AUTH_KEY_FILE, file.path()}}), LLM_SUCCESS);
  EXPECT_EQ(start({{llm_datadist::OPTION_INSECURE, "1"}, {llm_datadist::OPTION_AUTH_KEY_FILE, file.path()}}),
            LLM_PARAM_INVALID);
  EXPECT_THAT(llm_datadist::GetLastErrorText(), HasSubstr("exclude each other"));
  EXPECT_EQ(start({{llm_datadist::OPTION_INSECURE, "yes"}}), LLM_PARAM_INVALID);
}

TEST(TrustOptions, ComeFromTheEnvironmentOfProgramsThatCannotBeChanged) {
  const KeyFile file(KeyLine('1'));
  const TextOptions options = ClientOptions({{llm_datadist::OPTION_LISTEN_IP_INFO, "0.0.0.0:0"}});
  ::setenv("DATADIST_INSECURE", "1", 1);
  EXPECT_EQ(Node(1).Start(options), LLM_SUCCESS);
  ::unsetenv("DATADIST_INSECURE");
  ::setenv("DATADIST_AUTH_KEY_FILE", file.path().c_str(), 1);
  EXPECT_EQ(Node(1).Start(options), LLM_SUCCESS);
  ::setenv("DATADIST_AUTH_KEY_FILE", "/nonexistent/key", 1);
  EXPECT_EQ(Node(1).Start(options), LLM_PARAM_INVALID);
  ::unsetenv("DATADIST_AUTH_KEY_FILE");
}

}  // namespace
}  // namespace datadist::testing
