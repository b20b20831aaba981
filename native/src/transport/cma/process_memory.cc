#include "transport/cma/process_memory.h"

#include <cerrno>
#include <string>
#include <system_error>

namespace datadist {
namespace {

struct IovecList {
  iovec *next;
  size_t count;

  void Advance(size_t done) {
    while (count > 0 && done >= next->iov_len) {
      done -= next->iov_len;
      ++next;
      --count;
    }
    if (done > 0) {
      next->iov_base = reinterpret_cast<void *>(reinterpret_cast<uintptr_t>(next->iov_base) + done);
      next->iov_len -= done;
    }
  }
};

// Addresses stay integers: those of another process are no pointers here.
void Append(iovec *list, size_t &count, uintptr_t base, size_t length) {
  if (count > 0 && reinterpret_cast<uintptr_t>(list[count - 1].iov_base) + list[count - 1].iov_len == base) {
    list[count - 1].iov_len += length;
    return;
  }
  list[count++] = {reinterpret_cast<void *>(base), length};
}

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
  Append(local_, local_count_, reinterpret_cast<uintptr_t>(local), length);
  Append(remote_, remote_count_, static_cast<uintptr_t>(remote), length);
  bytes_ += length;
}

Status IovecBatch::Read(pid_t pid) {
  IovecList local{local_, local_count_};
  IovecList remote{remote_, remote_count_};
  uint64_t left = bytes_;
  local_count_ = 0;
  remote_count_ = 0;
  bytes_ = 0;
  while (left > 0) {
    const ssize_t moved = ::process_vm_readv(pid, local.next, local.count, remote.next, remote.count, 0);
    if (moved < 0 && errno == EINTR) {
      continue;
    }
    if (moved <= 0) {
      return VmFailed(pid, moved < 0 ? errno : EFAULT);
    }
    left -= static_cast<uint64_t>(moved);
    local.Advance(static_cast<size_t>(moved));
    remote.Advance(static_cast<size_t>(moved));
  }
  return Status::Ok();
}

}  // namespace datadist
