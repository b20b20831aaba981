#include "control/address.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>

#include "base/socket_io.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_LINK_FAILED;
using llm_datadist::LLM_PARAM_INVALID;
using llm_datadist::LLM_TIMEOUT;

constexpr int kBacklog = 128;

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

Result<Fd> Dial(const SocketAddress &address, Deadline deadline) {
  const std::string what = "connect to " + address.ToString() + ": ";
  Fd fd(::socket(address.family(), SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) {
    return Status(LLM_LINK_FAILED, what + ErrnoText(errno));
  }
  SetUpConnection(fd.get());
  if (::connect(fd.get(), address.get(), address.size()) == 0) {
    return fd;
  }
  if (errno != EINPROGRESS && errno != EINTR) {
    return Status(LLM_LINK_FAILED, what + ErrnoText(errno));
  }
  pollfd waiter{fd.get(), POLLOUT, 0};
  int ready = 0;
  do {
    const auto left = std::min<std::chrono::milliseconds::rep>(deadline.Remaining().count(), INT32_MAX);
    ready = ::poll(&waiter, 1, static_cast<int>(left));
  } while ((ready < 0 && errno == EINTR) || (ready == 0 && !deadline.Expired()));
  if (ready == 0) {
    return Status(LLM_TIMEOUT, what + "no answer in time");
  }
  int error = 0;
  socklen_t size = sizeof(error);
  if (ready < 0 || ::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &size) != 0) {
    error = errno;
  }
  if (error != 0) {
    // The kernel's own limit ended the attempt: to the caller that is a timeout like any other.
    return Status(error == ETIMEDOUT ? LLM_TIMEOUT : LLM_LINK_FAILED, what + ErrnoText(error));
  }
  return fd;
}

Result<Fd> Listen(const SocketAddress &address) {
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
  return fd;
}

}  // namespace datadist
