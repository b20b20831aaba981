#include "base/process_epoch.h"

#include <pthread.h>

#include <atomic>

namespace datadist {
namespace {

std::atomic<uint64_t> epoch{1};

}  // namespace

uint64_t ProcessEpoch() {
  static const int registered = ::pthread_atfork(nullptr, nullptr, [] { epoch.fetch_add(1); });
  (void)registered;
  return epoch.load(std::memory_order_relaxed);
}

}  // namespace datadist
