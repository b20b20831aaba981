#include "base/fd.h"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <mutex>
#include <set>

namespace datadist {
namespace {

struct Owned {
  std::mutex mutex;
  std::set<int> fds;  // guarded by mutex
};

// Never destroyed: descriptors of static objects are closed after our own destructors would have run.
Owned &TheOwned() {
  static auto *const owned = new Owned;
  return *owned;
}

// Only what is safe after fork() in a process that had threads. The numbers stay taken, because objects in the child
// still name them, and would close a stranger's.
void LeaveToParent() {
  const int nothing = ::open("/dev/null", O_RDWR | O_CLOEXEC);
  for (const int fd : TheOwned().fds) {
    if (nothing < 0 || ::dup3(nothing, fd, O_CLOEXEC) < 0) {
      ::close(fd);
    }
  }
  if (nothing >= 0) {
    ::close(nothing);
  }
  TheOwned().mutex.unlock();
}

Owned &Registered() {
  static const int registered = ::pthread_atfork([] { TheOwned().mutex.lock(); },
                                                 [] { TheOwned().mutex.unlock(); }, [] { LeaveToParent(); });
  (void)registered;
  return TheOwned();
}

}  // namespace

Fd::Fd(int fd) : fd_(fd) {
  if (fd_ >= 0) {
    Owned &owned = Registered();
    const std::lock_guard<std::mutex> lock(owned.mutex);
    owned.fds.insert(fd_);
  }
}

void Fd::Reset() {
  if (fd_ < 0) {
    return;
  }
  const int fd = std::exchange(fd_, -1);
  Owned &owned = Registered();
  const std::lock_guard<std::mutex> lock(owned.mutex);
  owned.fds.erase(fd);
  ::close(fd);
}

}  // namespace datadist
