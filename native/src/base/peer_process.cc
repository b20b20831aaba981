#include "base/peer_process.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

#include "base/socket_io.h"

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif

namespace datadist {
namespace {

using llm_datadist::LLM_LINK_FAILED;

// The kernel's own handle where it gives one (6.5 on). Else the pid is opened: the peer may have ended and its pid may be
// another's by then, but then the connection has ended too, and the handshake that is still to come fails.
Fd HandleOf(int connection, pid_t pid) {
  int handle = -1;
  socklen_t size = sizeof(handle);
  if (::getsockopt(connection, SOL_SOCKET, SO_PEERPIDFD, &handle, &size) == 0) {
    return Fd(handle);
  }
  return pid > 0 ? Fd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0))) : Fd();
}

}  // namespace

Result<std::shared_ptr<const PeerProcess>> PeerProcess::Of(int connection) {
  ucred peer{};
  socklen_t size = sizeof(peer);
  if (::getsockopt(connection, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) {
    return Status(LLM_LINK_FAILED, "the kernel does not say who the peer is: " + ErrnoText(errno));
  }
  if (peer.uid != ::geteuid()) {
    return Status(LLM_LINK_FAILED, "process " + std::to_string(peer.pid) + " on this host is of user " +
                                       std::to_string(peer.uid) + ", allowed: " + std::to_string(::geteuid()) +
                                       ", our own");
  }
  if (peer.pid == ::getpid()) {
    return Self();
  }
  Fd handle = HandleOf(connection, peer.pid);
  if (!handle) {
    return Status(LLM_LINK_FAILED, "process " + std::to_string(peer.pid) + " is gone");
  }
  return std::shared_ptr<const PeerProcess>(new PeerProcess(peer.pid, std::move(handle)));
}

Result<std::shared_ptr<const PeerProcess>> PeerProcess::OfChild(pid_t child) {
  Fd handle = HandleOf(-1, child);
  if (!handle) {
    return Status(LLM_LINK_FAILED, "process " + std::to_string(child) + ": " + ErrnoText(errno));
  }
  return std::shared_ptr<const PeerProcess>(new PeerProcess(child, std::move(handle)));
}

std::shared_ptr<const PeerProcess> PeerProcess::Self() {
  return std::shared_ptr<const PeerProcess>(new PeerProcess(::getpid(), Fd()));
}

bool PeerProcess::IsSelf() const { return pid_ == ::getpid(); }

bool PeerProcess::Alive() const {
  if (!handle_) {
    return IsSelf();  // not so in a child made by fork()
  }
  pollfd ended{handle_.get(), POLLIN, 0};
  int ready = 0;
  do {
    ready = ::poll(&ended, 1, 0);
  } while (ready < 0 && errno == EINTR);
  return ready == 0;
}

std::string PeerProcess::Name() const { return "process " + std::to_string(pid_); }

}  // namespace datadist
