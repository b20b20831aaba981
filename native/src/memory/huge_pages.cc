#include "memory/huge_pages.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <string>
#include <system_error>
#include <utility>

namespace datadist {
namespace {

using std::chrono::steady_clock;

constexpr uint64_t kHugePage = 2ULL << 20;
constexpr int kCollapse = 25;  // MADV_COLLAPSE (Linux 6.1), which older headers lack; older kernels refuse it

// How long an unregistration may have to wait: about 20 ms. Each call makes every core drain its lists of pages, so
// single huge pages would cost more.
constexpr uint64_t kSlice = 4 * kHugePage;

// After each slice as long as it took, so that at most half a core goes into it. Not a low priority: collapsing holds
// the process's map of memory, and a thread that is preempted with it makes everybody wait who faults a page in or
// reads this process from outside: with nice 19 on a busy machine 100 ms instead of 25, and five times as long in all.
constexpr std::chrono::milliseconds kLongestPause{100};

int Madvise(const Range &range, int advice) {
  return ::madvise(reinterpret_cast<void *>(static_cast<uintptr_t>(range.begin)), range.end - range.begin, advice);
}

}  // namespace

bool HugePagesAllowed() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string modes;
  // MADV_COLLAPSE does not ask for it, but who said "never" meant it. Without the file the kernel has none.
  return std::getline(file, modes) && modes.find("[never]") == std::string::npos;
}

bool AdviseHugePages(const Range &range) {
  const Ranges whole = WholeUnits({range}, kHugePage);
  return !whole.empty() && Madvise(whole.front(), MADV_HUGEPAGE) == 0;
}

HugePages::~HugePages() { Stop(); }

void HugePages::Add(int64_t id, const std::vector<uint64_t> &addrs, uint64_t bytes) {
  if (!HugePagesAllowed()) {
    return;
  }
  std::vector<Range> ranges;
  for (const uint64_t address : addrs) {
    ranges.push_back({address, address + bytes});
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  if (stopping_) {
    return;
  }
  registered_[id] = MakeRanges(ranges);
  ranges.insert(ranges.end(), held_.begin(), held_.end());
  // Of everything that is held: a huge page may lie under the end of one tensor and the start of another.
  held_ = MakeRanges(std::move(ranges));
  Ranges whole = WholeUnits(held_, kHugePage);
  const Ranges fresh = Minus(whole, asked_);
  asked_ = std::move(whole);
  if (pending_.empty() && running_.end == 0) {
    began_ = steady_clock::now();
  }
  for (const Range &range : fresh) {
    report_.bytes += range.end - range.begin;
    if (AdviseHugePages(range)) {
      pending_.push_back(range);
    }
  }
  pending_ = MakeRanges(std::move(pending_));
  if (!pending_.empty() && !thread_.joinable()) {
    try {
      thread_ = std::thread([this] { Run(); });
    } catch (const std::system_error &) {
      pending_.clear();  // the system has no more threads to give: the rest stays as it is
    }
  }
  changed_.notify_all();
}

void HugePages::Remove(int64_t id) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (registered_.erase(id) == 0) {
    return;
  }
  std::vector<Range> rest;
  for (const auto &[other, ranges] : registered_) {
    rest.insert(rest.end(), ranges.begin(), ranges.end());
  }
  held_ = MakeRanges(std::move(rest));
  asked_ = WholeUnits(held_, kHugePage);
  pending_ = Minus(pending_, Minus(pending_, asked_));
  changed_.notify_all();
  changed_.wait(lock, [this] { return Minus({running_}, asked_).empty(); });
}

HugePages::Report HugePages::Wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return stopping_ || (pending_.empty() && running_.end == 0); });
  return report_;
}

void HugePages::Stop() {
  std::thread ended;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    ended.swap(thread_);
  }
  changed_.notify_all();
  if (ended.joinable()) {
    ended.join();
  }
}

void HugePages::Run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return stopping_ || !pending_.empty(); });
    if (stopping_) {
      return;
    }
    running_ = TakeSliceLocked();
    const Range slice = running_;
    lock.unlock();
    const steady_clock::time_point start = steady_clock::now();
    const int error = Madvise(slice, kCollapse) == 0 ? 0 : errno;
    const steady_clock::duration took = steady_clock::now() - start;
    lock.lock();
    running_ = {};
    SettleLocked(slice, error);
    changed_.notify_all();
    changed_.wait_for(lock, std::min<steady_clock::duration>(took, kLongestPause), [this] { return stopping_; });
  }
}

Range HugePages::TakeSliceLocked() {
  Range &first = pending_.front();
  const Range slice{first.begin, std::min(first.end, first.begin + kSlice)};
  first.begin = slice.end;
  if (first.begin == first.end) {
    pending_.erase(pending_.begin());
  }
  return slice;
}

void HugePages::SettleLocked(const Range &slice, int error) {
  if (error == 0) {
    report_.huge_bytes += slice.end - slice.begin;
  } else if (error == ENOMEM || error == EBUSY) {
    // No huge page is free, or the control group has no memory left: every further try would make the kernel search and
    // push out other memory. It comes back to advised memory by itself when it has some.
    pending_.clear();
  }
  // Else some page was in use just now, or not touched yet: that, too, is left to the kernel.
  if (pending_.empty()) {
    report_.seconds += std::chrono::duration<double>(steady_clock::now() - began_).count();
  }
}

}  // namespace datadist
