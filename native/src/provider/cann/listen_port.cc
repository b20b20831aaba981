#include "provider/cann/listen_port.h"

#include <sys/socket.h>

#include <cerrno>
#include <cstring>

#include "base/fd.h"
#include "control/address.h"

namespace datadist::cann {
namespace {

using llm_datadist::LLM_FAILED;

// Bound and not listening; closed by the Fd.
Result<Fd> Bind(const std::string &ip, uint16_t port) {
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

}  // namespace

Result<ListenAddress> ParseListenAddress(const std::string &text) {
  const Result<SocketAddress> address = SocketAddress::Parse(text);
  if (!address.ok()) {
    return Status(address.status().code(), "llm.ListenIpInfo: " + address.status().text());
  }
  if (address.value().family() != AF_INET) {
    return Invalid("llm.ListenIpInfo is '" + text + "': CANN links to IPv4 addresses only");
  }
  return ListenAddress{text.substr(0, text.rfind(':')), address.value().port()};
}

Result<uint16_t> FindFreePort(const std::string &ip) {
  const Result<Fd> bound = Bind(ip, 0);
  if (!bound.ok()) {
    return bound.status();
  }
  return SocketAddress::LocalOf(bound.value().get()).port();
}

bool IsFree(const ListenAddress &address) { return Bind(address.ip, address.port).ok(); }

}  // namespace datadist::cann
