#include <sys/prctl.h>
#include <sys/uio.h>

#include <cerrno>
#include <fstream>
#include <string>

#include "base/socket_io.h"
#include "transport/cma/cma_data_path.h"

namespace datadist {

using llm_datadist::LLM_LINK_FAILED;

// An address that no process has mapped: the kernel asks first whether we may read, then finds nothing to read.
Status ProbeCma(const PeerProcess &process) {
  if (process.pid() <= 0) {
    return Status(LLM_LINK_FAILED, "the peer is in another pid namespace");
  }
  char byte = 0;
  const iovec here{&byte, sizeof(byte)};
  const iovec nowhere{reinterpret_cast<void *>(~uintptr_t{0}), sizeof(byte)};
  const ssize_t read = ::process_vm_readv(process.pid(), &here, 1, &nowhere, 1, 0);
  const int error = read < 0 ? errno : EFAULT;
  if (!process.Alive()) {
    return Status(LLM_LINK_FAILED, process.Name() + " is gone");
  }
  if (error == EPERM) {
    return Status(LLM_LINK_FAILED, "the kernel refuses access to the memory of " + process.Name() +
                                       " (not dumpable, seccomp or ptrace_scope)");
  }
  return error == EFAULT ? Status::Ok() : Status(LLM_LINK_FAILED, process.Name() + ": " + ErrnoText(error));
}

void AllowCmaFromPeers() {
#ifdef PR_SET_PTRACER
  // Yama lets a process name one reader only, or all of its user. Where it does not restrict readers, nothing is said:
  // a later change of the administrator's is to hold for this process too.
  std::ifstream file("/proc/sys/kernel/yama/ptrace_scope");
  int scope = 0;
  if (file >> scope && scope == 1) {
    (void)::prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
  }
#endif
}

}  // namespace datadist
