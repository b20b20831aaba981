#include "transport/cma/process_memory.h"

#include <cerrno>
#include <string>
#include <system_error>
#include <utility>

namespace datadist {
namespace {

Status VmFailed(pid_t pid, int error) {
  const std::string process = "process " + std::to_string(pid);
  switch (error) {
    case ESRCH:
      return Status(llm_datadist::LLM_FAILED, process + " is gone");
    case EPERM:
      return Status(llm_datadist::LLM_FAILED, "the kernel refuses access to the memory of " + process +
                                                  " (other user, not dumpable, seccomp or ptrace_scope)");
    case EFAULT:
      return Status(llm_datadist::LLM_FAILED, "memory of the transfer is not mapped, here or in " + process);
    default:
      return Status(llm_datadist::LLM_FAILED,
                    "access to the memory of " + process + ": " + std::generic_category().message(error));
  }
}

}  // namespace

void IovecBatch::Add(uint64_t remote, void *local, uint64_t length) {
  AppendIovec(local_, local_count_, reinterpret_cast<uintptr_t>(local), length);
  AppendIovec(remote_, remote_count_, static_cast<uintptr_t>(remote), length);
  bytes_ += length;
}

Status IovecBatch::Read(pid_t pid) {
  iovec *local = local_;
  iovec *remote = remote_;
  size_t local_count = std::exchange(local_count_, 0);
  size_t remote_count = std::exchange(remote_count_, 0);
  uint64_t left = std::exchange(bytes_, 0);
  while (left > 0) {
    const ssize_t moved = ::process_vm_readv(pid, local, local_count, remote, remote_count, 0);
    if (moved < 0 && errno == EINTR) {
      continue;
    }
    if (moved <= 0) {
      return VmFailed(pid, moved < 0 ? errno : EFAULT);
    }
    left -= static_cast<uint64_t>(moved);
    AdvanceIovecs(local, local_count, static_cast<size_t>(moved));
    AdvanceIovecs(remote, remote_count, static_cast<size_t>(moved));
  }
  return Status::Ok();
}

}  // namespace datadist
