// Who is at the other end of a connection within this host, on the word of the kernel: nothing here comes from the peer.
#ifndef DATADIST_BASE_PEER_PROCESS_H_
#define DATADIST_BASE_PEER_PROCESS_H_

#include <sys/types.h>

#include <memory>
#include <string>

#include "base/fd.h"
#include "base/status.h"

namespace datadist {

class PeerProcess {
 public:
  // The process that made the other end of an AF_UNIX connection: by connect() where we accepted it, by listen() where
  // we connected. LLM_LINK_FAILED for a process of another user, and for one that has ended.
  static Result<std::shared_ptr<const PeerProcess>> Of(int connection);
  // A child of ours that nobody has waited for: until then its pid is nobody else's.
  static Result<std::shared_ptr<const PeerProcess>> OfChild(pid_t child);
  // This process, as a peer of its own.
  static std::shared_ptr<const PeerProcess> Self();

  // As this process sees it; 0 for one in a pid namespace that it does not see into.
  pid_t pid() const { return pid_; }
  bool IsSelf() const;
  // A pid means the same process for as long as this holds: looked at after the use of a pid, it says whose it was.
  bool Alive() const;
  std::string Name() const;

 private:
  PeerProcess(pid_t pid, Fd handle) : pid_(pid), handle_(std::move(handle)) {}

  const pid_t pid_;
  const Fd handle_;  // a pidfd; none for this process, which is alive when it asks
};

}  // namespace datadist

#endif  // DATADIST_BASE_PEER_PROCESS_H_
