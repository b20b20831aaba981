// A Node in a process of its own: the test binary, executed again, obeying one command after the other.
#ifndef DATADIST_TESTS_SUPPORT_PEER_PROCESS_H_
#define DATADIST_TESTS_SUPPORT_PEER_PROCESS_H_

#include <sys/types.h>

#include <string>

#include "base/fd.h"
#include "support/node.h"

namespace datadist::testing {

class PeerProcess {
 public:
  // Executes this binary with the peer role; its main() must begin with RunIfPeer.
  PeerProcess();
  ~PeerProcess();  // kills it
  PeerProcess(const PeerProcess &) = delete;
  PeerProcess &operator=(const PeerProcess &) = delete;

  llm_datadist::Status Start(uint64_t cluster_id, const TextOptions &options);
  uint16_t port();
  int64_t AddCache(const Shape &shape, uint32_t seed);
  Bytes Contents(int64_t cache_id);
  llm_datadist::Status Link(uint64_t remote_id, uint16_t port);
  llm_datadist::Status Unregister(int64_t cache_id);
  llm_datadist::Status Pull(uint64_t cluster, int64_t src_cache, int64_t dst_cache, const Blocks &src,
                            const Blocks &dst);
  llm_datadist::Status Push(int64_t src_cache, uint64_t cluster, int64_t dst_cache, const Blocks &src,
                            const Blocks &dst);
  bool Alive(uint64_t cluster);

  // SIGSTOP returns when the process has stopped, SIGKILL when it is gone.
  void Signal(int signal);

 private:
  std::string Ask(const std::string &command);
  uint64_t AskNumber(const std::string &command);
  std::string ReadLine();
  pid_t pid_ = -1;
  Fd channel_;
};

// In the peer: obeys until the channel closes, then exits. Elsewhere: returns.
void RunIfPeer(int argc, char **argv);

}  // namespace datadist::testing

#endif  // DATADIST_TESTS_SUPPORT_PEER_PROCESS_H_
