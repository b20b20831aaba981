// IP literals, and the two ways to get a socket from one. No name is ever resolved: an address is what the caller
// wrote.
//
// Who listens on ip:port listens on the abstract AF_UNIX name "datadist/ip:port" too, and who dials tries that first:
// between two processes of one host (one network namespace) the kernel then says who is at the other end.
#ifndef DATADIST_CONTROL_ADDRESS_H_
#define DATADIST_CONTROL_ADDRESS_H_

#include <sys/socket.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "base/deadline.h"
#include "base/fd.h"
#include "base/peer_process.h"
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
  bool IsLoopback() const;
  std::string ToString() const;

 private:
  sockaddr_storage storage_{};
  socklen_t size_ = 0;
};

struct Connection {
  Fd fd;
  std::shared_ptr<const PeerProcess> process;  // none over TCP: nobody vouches for who is there
  std::string note;                            // why a process of this host that listens there was not taken
};

// Within the host if a process of our user listens there, else over TCP, with TCP_NODELAY. LLM_LINK_FAILED when refused
// or unreachable, LLM_TIMEOUT at the deadline.
Result<Connection> Dial(const SocketAddress &address, Deadline deadline);
// Over TCP in any case: for data connections, whose owner is known by the link's token.
Result<Fd> DialTcp(const SocketAddress &address, Deadline deadline);

// Dial in steps that do not wait, for an event loop.
struct LocalStep {
  Connection connection;  // no fd: nobody of ours listens there within the host
  bool full = false;      // somebody does, and has no room just now: to be tried again
};
LocalStep TryLocal(const SocketAddress &address);
// A socket that becomes writable when the attempt has ended; FinishTcp then says how.
Result<Fd> StartTcp(const SocketAddress &address);
Status FinishTcp(int fd, const SocketAddress &address);

struct Listeners {
  Fd tcp;
  Fd local;  // none where the kernel has no AF_UNIX for us
};

// Listening, non-blocking sockets. LLM_FAILED when the address cannot be bound, or its local name is another's.
Result<Listeners> Listen(const SocketAddress &address);

// The accepted connection with what the kernel says of its other end. LLM_LINK_FAILED for a process of another user.
Result<Connection> Identify(Fd accepted);

// What every control and data connection needs: no delay, no inheritance by exec.
void SetUpConnection(int fd);

}  // namespace datadist

#endif  // DATADIST_CONTROL_ADDRESS_H_
