#include "provider/cann/listen_port.h"

#include <sys/socket.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "base/fd.h"
#include "base/log.h"
#include "control/address.h"

namespace datadist::cann {
namespace {

using llm_datadist::LLM_FAILED;

constexpr int kAttempts = 8;

struct ListenAddress {
  std::string ip;
  uint16_t port = 0;
  std::string ToString() const { return ip + ":" + std::to_string(port); }
};

Result<ListenAddress> ParseListenAddress(const std::string &text) {
  const Result<SocketAddress> address = SocketAddress::Parse(text);
  if (!address.ok()) {
    return Status(address.status().code(), "llm.ListenIpInfo: " + address.status().text());
  }
  if (address.value().family() != AF_INET) {
    return Invalid("llm.ListenIpInfo is '" + text + "': CANN links to IPv4 addresses only");
  }
  if (address.value().IsLoopback()) {
    Log(LogLevel::kWarning, "llm.ListenIpInfo is '" + text + "': that becomes the server_id of this host, and no other "
                            "host can link to it");
  }
  return ListenAddress{text.substr(0, text.rfind(':')), address.value().port()};
}

// Bound and not listening; closed by the Fd.
Result<Fd> BoundTo(const std::string &ip, uint16_t port) {
  const Result<SocketAddress> address = SocketAddress::FromIp(ip, port);
  if (!address.ok()) {
    return address.status();
  }
  Fd fd(::socket(address.value().family(), SOCK_STREAM | SOCK_CLOEXEC, 0));
  const int on = 1;  // as the library's listener
  if (!fd || ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) != 0 ||
      ::bind(fd.get(), address.value().get(), address.value().size()) != 0) {
    return Status(LLM_FAILED, "bind to " + address.value().ToString() + ": " + std::strerror(errno));
  }
  return fd;
}

Result<uint16_t> FindFreePort(const std::string &ip) {
  const Result<Fd> bound = BoundTo(ip, 0);
  if (!bound.ok()) {
    return bound.status();
  }
  return SocketAddress::LocalOf(bound.value().get()).port();
}

}  // namespace

Result<uint16_t> WithListenPort(Options options, const std::function<Status(const Options &)> &act) {
  const auto listen = options.find(llm_datadist::OPTION_LISTEN_IP_INFO);
  if (listen == options.end()) {
    const Status done = act(options);
    return done.ok() ? Result<uint16_t>(uint16_t{0}) : done;
  }
  const Result<ListenAddress> asked = ParseListenAddress(listen->second);
  if (!asked.ok()) {
    return asked.status();
  }
  ListenAddress address = asked.value();
  for (int attempt = 1;; ++attempt) {
    if (asked.value().port == 0) {
      const Result<uint16_t> free = FindFreePort(address.ip);
      if (!free.ok()) {
        return free.status();
      }
      address.port = free.value();
    }
    listen->second = address.ToString();
    const Status done = act(options);
    if (done.ok()) {
      return address.port;
    }
    if (done.code() != LLM_FAILED || BoundTo(address.ip, address.port).ok()) {
      return done;  // it is not for the port
    }
    if (asked.value().port != 0 || attempt == kAttempts) {
      return Status(done.code(), done.text() + "; " + address.ToString() + " is in use, or no address of this host");
    }
  }
}

}  // namespace datadist::cann
