// Ends of a channel for tests: a server with its leases, a client that is asked and waited for, and bare sockets in place
// of either.
#ifndef DATADIST_TESTS_SUPPORT_CHANNEL_ENDS_H_
#define DATADIST_TESTS_SUPPORT_CHANNEL_ENDS_H_

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>

#include <chrono>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/socket_io.h"
#include "channel/client.h"
#include "channel/server.h"
#include "support/frames.h"

namespace datadist::testing {

constexpr std::chrono::seconds kLong{60};
constexpr uint16_t kContentVersion = 3;
inline SocketAddress Loopback(uint16_t port = 0) { return SocketAddress::FromIp("127.0.0.1", port).value(); }
inline Deadline Soon() { return Deadline::In(kLong); }
inline Trust Anybody() { return Trust{nullptr, true}; }

inline Grantor TheGrantor() { return Grantor{"engine-p", {7}, kContentVersion}; }
inline DescribeRank AskRank(uint16_t tp_rank, uint64_t asker = 0) {
  return DescribeRank{"engine-p", {7}, {0, tp_rank}, asker};
}

// Lets in anybody over TCP, unless told otherwise.
struct ServerEnd {
  explicit ServerEnd(const ChannelLimits &limits = {}, uint16_t port = 0, const Trust &trust = Anybody(),
                     std::chrono::milliseconds apply = kLong)
      : leases(std::make_shared<LeaseTable>(std::chrono::minutes(10))),
        handoffs(std::move(HandoffTable::Create()).value()),
        roles(std::make_shared<RoleSwitch>(leases, handoffs, apply)),
        server(std::move(ChannelServer::Create(Loopback(port), TheGrantor(), trust, leases, limits, handoffs, roles))
                   .value()) {}
  uint16_t port() const { return server->port(); }
  LeaseTable::Ticket Grant(const std::string &request_id = "r") const {
    const LeaseTable::Durations durations{std::chrono::minutes(5), std::chrono::minutes(5)};
    return leases->Grant(request_id, LeaseContent{{1}, {2}}, 3, durations).value();
  }
  const std::shared_ptr<LeaseTable> leases;
  const std::shared_ptr<HandoffTable> handoffs;
  const std::shared_ptr<RoleSwitch> roles;
  const std::unique_ptr<ChannelServer> server;
};

class ClientEnd {
 public:
  explicit ClientEnd(const ChannelClientLimits &limits = {}, const Trust &trust = Anybody(),
                     uint16_t content_version = kContentVersion)
      : client(std::move(ChannelClient::Create(content_version, trust, limits)).value()) {}

  uint64_t Send(uint16_t port, const ChannelRequest &request, std::chrono::milliseconds timeout = kLong) const {
    return client->Send("127.0.0.1", port, request, timeout);
  }
  // The answer to that request; those to others are kept for who waits for them.
  ChannelAnswer Wait(uint64_t id) {
    while (answers_.count(id) == 0) {
      pollfd waiter{client->event_fd(), POLLIN, 0};
      if (::poll(&waiter, 1, 2 * static_cast<int>(std::chrono::milliseconds(kLong).count())) != 1) {
        ADD_FAILURE() << "no answer and no failure";
        return {};
      }
      for (ChannelAnswer &answer : client->Take()) {
        EXPECT_EQ(answers_.count(answer.id), 0U);
        answers_.emplace(answer.id, std::move(answer));
      }
    }
    return std::move(answers_.extract(id).mapped());
  }
  ChannelAnswer Ask(uint16_t port, const ChannelRequest &request, std::chrono::milliseconds timeout = kLong) {
    return Wait(Send(port, request, timeout));
  }
  // Empty if there is an answer.
  std::string Failure(uint16_t port, std::chrono::milliseconds timeout = kLong) {
    const ChannelAnswer answer = Ask(port, Renew{}, timeout);
    const auto *const none = std::get_if<NoAnswer>(&answer.answer);
    return none == nullptr ? "" : none->error + (none->timed_out ? " (timed out)" : "");
  }

  const std::unique_ptr<ChannelClient> client;

 private:
  std::map<uint64_t, ChannelAnswer> answers_;
};

constexpr TypeSet kAnyAnswer(MessageType::kChannelReady, MessageType::kReject, MessageType::kRank,
                             MessageType::kRenewed, MessageType::kConfirmed, MessageType::kReleased,
                             MessageType::kHandoff, MessageType::kReported, MessageType::kOffered,
                             MessageType::kWatched, MessageType::kSwitched);

// A client of no code of ours. Over TCP, so that its source is another than that of a client in this process.
class BareClient {
 public:
  explicit BareClient(uint16_t port) : fd(std::move(DialTcp(Loopback(port), Soon())).value()) {}
  Status Send(MessageType type, const std::vector<uint8_t> &body, uint32_t seq = 1) const {
    return SendFrame(fd.get(), type, seq, body, Soon());
  }
  void SendBytes(const std::vector<uint8_t> &bytes) const {
    [[maybe_unused]] const Status sent = SendAll(fd.get(), bytes.data(), bytes.size(), Soon());
  }
  Result<Frame> Receive() const { return RecvFrame(fd.get(), kAnyAnswer, Soon()); }
  bool Greet() const {
    const ChannelGreeting greeting{{kProtocolVersion, kProtocolVersion}, kContentVersion};
    if (!Send(MessageType::kChannel, Encode(greeting)).ok()) {
      return false;
    }
    const Result<Frame> ready = Receive();
    return ready.ok() && ready.value().type == MessageType::kChannelReady;
  }
  // Waits for the end of the connection, whatever comes before.
  bool IsCutOff() const {
    std::vector<uint8_t> sink(1U << 16);
    while (WaitReadable(fd.get(), Soon()).ok()) {
      if (::recv(fd.get(), sink.data(), sink.size(), MSG_DONTWAIT) <= 0) {
        return true;
      }
    }
    return false;
  }
  const Fd fd;
};

// A server of no code of ours: connections as they come, by whichever way.
class BareServer {
 public:
  BareServer() : listeners_(std::move(Listen(Loopback())).value()) {}
  uint16_t port() const { return SocketAddress::LocalOf(listeners_.tcp.get()).port(); }
  Fd Accept() const {
    pollfd waiter{listeners_.local.get(), POLLIN, 0};
    ::poll(&waiter, 1, static_cast<int>(std::chrono::milliseconds(kLong).count()));
    return Fd(::accept4(listeners_.local.get(), nullptr, nullptr, SOCK_CLOEXEC));
  }
  // A connection that was greeted.
  Fd Welcome() const {
    Fd fd = Accept();
    EXPECT_TRUE(RecvFrame(fd.get(), TypeSet(MessageType::kChannel), Soon()).ok());
    EXPECT_TRUE(SendFrame(fd.get(), MessageType::kChannelReady, 0, {}, Soon()).ok());
    return fd;
  }

 private:
  const Listeners listeners_;
};

inline Result<Frame> ReceiveRequest(const Fd &fd) {
  return RecvFrame(fd.get(),
                   TypeSet(MessageType::kDescribeRank, MessageType::kRenew, MessageType::kConfirm,
                           MessageType::kRelease, MessageType::kAwait, MessageType::kReport, MessageType::kOffer,
                           MessageType::kWatch, MessageType::kDeliver, MessageType::kSwitch,
                           MessageType::kDeclare),
                   Soon());
}

}  // namespace datadist::testing

#endif  // DATADIST_TESTS_SUPPORT_CHANNEL_ENDS_H_
