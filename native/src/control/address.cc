#include "control/address.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/un.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstring>
#include <vector>

#include "base/socket_io.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_LINK_FAILED;
using llm_datadist::LLM_PARAM_INVALID;
using llm_datadist::LLM_TIMEOUT;

constexpr int kBacklog = 128;

std::string ConnectTo(const SocketAddress &address) { return "connect to " + address.ToString() + ": "; }

Status BadIp(std::string_view ip) {
  return Status(LLM_PARAM_INVALID, "ip '" + std::string(ip) + "' is not an IPv4 or IPv6 literal");
}

Result<uint16_t> ParsePort(std::string_view text) {
  uint16_t port = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), port);
  if (error != std::errc() || end != text.data() + text.size()) {
    return Status(LLM_PARAM_INVALID, "port '" + std::string(text) + "' is not a number in 0..65535");
  }
  return port;
}

}  // namespace

Result<SocketAddress> SocketAddress::FromIp(std::string_view ip, uint16_t port) {
  const std::string text(ip);
  // inet_pton would stop at an embedded zero and accept what stands before it.
  if (text.find('\0') != std::string::npos) {
    return BadIp(ip);
  }
  SocketAddress address;
  auto *v4 = reinterpret_cast<sockaddr_in *>(&address.storage_);
  if (::inet_pton(AF_INET, text.c_str(), &v4->sin_addr) == 1) {
    v4->sin_family = AF_INET;
    v4->sin_port = htons(port);
    address.size_ = sizeof(*v4);
    return address;
  }
  auto *v6 = reinterpret_cast<sockaddr_in6 *>(&address.storage_);
  if (::inet_pton(AF_INET6, text.c_str(), &v6->sin6_addr) == 1) {
    v6->sin6_family = AF_INET6;
    v6->sin6_port = htons(port);
    address.size_ = sizeof(*v6);
    return address;
  }
  return BadIp(ip);
}

Result<SocketAddress> SocketAddress::Parse(std::string_view text) {
  std::string_view ip;
  const size_t colon = text.rfind(':');
  if (colon == std::string_view::npos) {
    return Status(LLM_PARAM_INVALID, "'" + std::string(text) + "' is not of the form 'ip:port' or '[ipv6]:port'");
  }
  ip = text.substr(0, colon);
  const bool bracketed = ip.size() >= 2 && ip.front() == '[' && ip.back() == ']';
  if (bracketed) {
    ip = ip.substr(1, ip.size() - 2);
  }
  const Result<uint16_t> port = ParsePort(text.substr(colon + 1));
  if (!port.ok()) {
    return port.status();
  }
  Result<SocketAddress> address = FromIp(ip, port.value());
  if (address.ok() && bracketed != (address.value().family() == AF_INET6)) {
    return Status(LLM_PARAM_INVALID, "'" + std::string(text) + "': an IPv6 address, and no other, stands in brackets");
  }
  return address;
}

SocketAddress SocketAddress::LocalOf(int fd) {
  SocketAddress address;
  address.size_ = sizeof(address.storage_);
  if (::getsockname(fd, reinterpret_cast<sockaddr *>(&address.storage_), &address.size_) != 0) {
    return SocketAddress();
  }
  return address;
}

SocketAddress SocketAddress::PeerOf(int fd) {
  SocketAddress address;
  address.size_ = sizeof(address.storage_);
  if (::getpeername(fd, reinterpret_cast<sockaddr *>(&address.storage_), &address.size_) != 0) {
    return SocketAddress();
  }
  return address;
}

uint16_t SocketAddress::port() const {
  if (family() == AF_INET6) {
    return ntohs(reinterpret_cast<const sockaddr_in6 *>(&storage_)->sin6_port);
  }
  return ntohs(reinterpret_cast<const sockaddr_in *>(&storage_)->sin_port);
}

bool SocketAddress::IsLoopback() const {
  if (family() == AF_INET6) {
    return IN6_IS_ADDR_LOOPBACK(&reinterpret_cast<const sockaddr_in6 *>(&storage_)->sin6_addr);
  }
  return family() == AF_INET && ntohl(reinterpret_cast<const sockaddr_in *>(&storage_)->sin_addr.s_addr) >> 24 == 127;
}

std::string SocketAddress::ToString() const {
  char ip[INET6_ADDRSTRLEN] = "?";
  if (family() == AF_INET6) {
    ::inet_ntop(AF_INET6, &reinterpret_cast<const sockaddr_in6 *>(&storage_)->sin6_addr, ip, sizeof(ip));
    return "[" + std::string(ip) + "]:" + std::to_string(port());
  }
  if (family() == AF_INET) {
    ::inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in *>(&storage_)->sin_addr, ip, sizeof(ip));
    return std::string(ip) + ":" + std::to_string(port());
  }
  return "?";
}

void SetUpConnection(int fd) {
  const int on = 1;
  ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
}

Result<Fd> StartTcp(const SocketAddress &address) {
  Fd fd(::socket(address.family(), SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) {
    return Status(LLM_LINK_FAILED, ConnectTo(address) + ErrnoText(errno));
  }
  SetUpConnection(fd.get());
  if (::connect(fd.get(), address.get(), address.size()) != 0 && errno != EINPROGRESS && errno != EINTR) {
    return Status(LLM_LINK_FAILED, ConnectTo(address) + ErrnoText(errno));
  }
  return fd;
}

Status FinishTcp(int fd, const SocketAddress &address) {
  int error = 0;
  socklen_t size = sizeof(error);
  if (::getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) != 0) {
    error = errno;
  }
  if (error == ECONNRESET || error == EPIPE) {
    return Status::Ok();  // it was made, and the other end has closed it since: whoever uses it is told so
  }
  // The kernel's own limit ended the attempt: to the caller that is a timeout like any other.
  return error == 0 ? Status::Ok()
                    : Status(error == ETIMEDOUT ? LLM_TIMEOUT : LLM_LINK_FAILED, ConnectTo(address) + ErrnoText(error));
}

Result<Fd> DialTcp(const SocketAddress &address, Deadline deadline) {
  Result<Fd> fd = StartTcp(address);
  if (!fd.ok()) {
    return fd;
  }
  pollfd waiter{fd.value().get(), POLLOUT, 0};
  int ready = 0;
  do {
    ready = ::poll(&waiter, 1, deadline.PollMillis());
  } while ((ready < 0 && errno == EINTR) || (ready == 0 && !deadline.Expired()));
  if (ready == 0) {
    return Status(LLM_TIMEOUT, ConnectTo(address) + "no answer in time");
  }
  if (Status status = FinishTcp(fd.value().get(), address); !status.ok()) {
    return status;
  }
  return fd;
}

namespace {

struct LocalName {
  sockaddr_un name{};
  socklen_t size = 0;
};

LocalName LocalNameOf(const std::string &address) {
  const std::string text = "datadist/" + address;
  LocalName local;
  local.name.sun_family = AF_UNIX;
  // Abstract: behind a zero byte, without a file, gone with its socket.
  const size_t length = std::min(text.size(), sizeof(local.name.sun_path) - 1);
  std::memcpy(local.name.sun_path + 1, text.data(), length);
  local.size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + length);
  return local;
}

SocketAddress AnyOf(const SocketAddress &address) {
  return SocketAddress::FromIp(address.family() == AF_INET6 ? "::" : "0.0.0.0", address.port()).value();
}

// Whether this host has that IP: a process that listens on all of them has one local name for all.
bool IsOurs(const SocketAddress &address) {
  const Fd probe(::socket(address.family(), SOCK_DGRAM | SOCK_CLOEXEC, 0));
  sockaddr_storage at{};
  std::memcpy(&at, address.get(), address.size());
  auto &port = address.family() == AF_INET6 ? reinterpret_cast<sockaddr_in6 &>(at).sin6_port
                                            : reinterpret_cast<sockaddr_in &>(at).sin_port;
  port = 0;
  return probe && ::bind(probe.get(), reinterpret_cast<const sockaddr *>(&at), address.size()) == 0;
}

// A full backlog is the only reason to wait that the kernel has, and it has no way to wait for room without blocking.
constexpr int kBacklogPauseMs = 1;

}  // namespace

// Nobody, or a process of another user: not ours to talk to within the host, over TCP it needs a key as any other.
LocalStep TryLocal(const SocketAddress &address) {
  std::vector<std::string> names = {address.ToString()};
  if (const SocketAddress any = AnyOf(address); IsOurs(address) && any.ToString() != names.front()) {
    names.push_back(any.ToString());
  }
  LocalStep step;
  for (const std::string &name : names) {
    const LocalName local = LocalNameOf(name);
    Fd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!fd) {
      return step;
    }
    if (::connect(fd.get(), reinterpret_cast<const sockaddr *>(&local.name), local.size) != 0) {
      step.full = errno == EAGAIN || errno == EINTR;
      if (step.full) {
        return step;
      }
      continue;
    }
    Result<Connection> known = Identify(std::move(fd));
    if (known.ok()) {
      return {std::move(known).value(), false};
    }
    step.connection.note = known.status().text();
  }
  return step;
}

Result<Connection> Dial(const SocketAddress &address, Deadline deadline) {
  LocalStep step = TryLocal(address);
  while (step.full && !deadline.Expired()) {
    ::poll(nullptr, 0, kBacklogPauseMs);
    step = TryLocal(address);
  }
  Connection local = std::move(step.connection);
  if (local.fd) {
    return local;
  }
  Result<Fd> remote = DialTcp(address, deadline);
  if (!remote.ok()) {
    return remote.status();
  }
  return Connection{std::move(remote).value(), nullptr, std::move(local.note)};
}

Result<Connection> Identify(Fd accepted) {
  int family = AF_UNSPEC;
  socklen_t size = sizeof(family);
  if (::getsockopt(accepted.get(), SOL_SOCKET, SO_DOMAIN, &family, &size) != 0) {
    return Status(LLM_LINK_FAILED, "SO_DOMAIN: " + ErrnoText(errno));
  }
  if (family != AF_UNIX) {
    SetUpConnection(accepted.get());
    return Connection{std::move(accepted), nullptr, ""};
  }
  Result<std::shared_ptr<const PeerProcess>> process = PeerProcess::Of(accepted.get());
  if (!process.ok()) {
    return process.status();
  }
  return Connection{std::move(accepted), std::move(process).value(), ""};
}

Result<Listeners> Listen(const SocketAddress &address) {
  const std::string what = "listen on " + address.ToString() + ": ";
  Fd fd(::socket(address.family(), SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) {
    return Status(LLM_FAILED, what + ErrnoText(errno));
  }
  const int on = 1;
  // A restarted server must get its port back although connections of its predecessor are still in TIME_WAIT.
  ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  if (address.family() == AF_INET6) {
    ::setsockopt(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof(on));
  }
  if (::bind(fd.get(), address.get(), address.size()) != 0 || ::listen(fd.get(), kBacklog) != 0) {
    return Status(LLM_FAILED, what + ErrnoText(errno));
  }
  Fd local(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (local) {
    const LocalName name = LocalNameOf(SocketAddress::LocalOf(fd.get()).ToString());
    if (::bind(local.get(), reinterpret_cast<const sockaddr *>(&name.name), name.size) != 0 ||
        ::listen(local.get(), kBacklog) != 0) {
      return Status(LLM_FAILED, what + "its local name '" + (name.name.sun_path + 1) + "': " + ErrnoText(errno));
    }
  }
  return Listeners{std::move(fd), std::move(local)};
}

}  // namespace datadist
