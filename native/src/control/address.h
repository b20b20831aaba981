// IP literals, and the two ways to get a socket from one. No name is ever resolved: an address is what the caller
// wrote.
#ifndef DATADIST_CONTROL_ADDRESS_H_
#define DATADIST_CONTROL_ADDRESS_H_

#include <sys/socket.h>

#include <cstdint>
#include <string>
#include <string_view>

#include "base/deadline.h"
#include "base/fd.h"
#include "base/status.h"

namespace datadist {

class SocketAddress {
 public:
  // LLM_PARAM_INVALID unless `ip` is an IPv4 or IPv6 literal.
  static Result<SocketAddress> FromIp(std::string_view ip, uint16_t port);
  // "ip:port" or "[ipv6]:port".
  static Result<SocketAddress> Parse(std::string_view text);
  static SocketAddress LocalOf(int fd);
  static SocketAddress PeerOf(int fd);

  const sockaddr *get() const { return reinterpret_cast<const sockaddr *>(&storage_); }
  socklen_t size() const { return size_; }
  int family() const { return storage_.ss_family; }
  uint16_t port() const;
  std::string ToString() const;

 private:
  sockaddr_storage storage_{};
  socklen_t size_ = 0;
};

// A connected socket with TCP_NODELAY. LLM_LINK_FAILED when refused or unreachable, LLM_TIMEOUT at the deadline.
Result<Fd> Dial(const SocketAddress &address, Deadline deadline);

// A listening, non-blocking socket. LLM_FAILED when the address cannot be bound.
Result<Fd> Listen(const SocketAddress &address);

// What every control and data connection needs: no delay, no inheritance by exec.
void SetUpConnection(int fd);

}  // namespace datadist

#endif  // DATADIST_CONTROL_ADDRESS_H_
