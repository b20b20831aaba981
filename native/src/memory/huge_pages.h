// Huge pages under registered memory. cma pins and copies page by page: with pages of 2 MiB it moves bytes about two and
// a half times as fast as with pages of 4 KiB.
//
//   Add ── memory that no registration had yet: advised at once, so that what is untouched is huge from its first touch
//    └──> a thread of its own: what was touched before is collapsed, slice by slice ──> Report
//
// Nobody waits for the collapse: it takes up to seconds per GiB. All of it is a hint: what cannot have huge pages (file
// mappings, less than a huge page, no such memory, a machine that has none to spare) stays as it is. No byte changes.
#ifndef DATADIST_MEMORY_HUGE_PAGES_H_
#define DATADIST_MEMORY_HUGE_PAGES_H_

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "memory/ranges.h"

namespace datadist {

// Whether this machine hands out huge pages at all: /sys/kernel/mm/transparent_hugepage/enabled is not "never".
bool HugePagesAllowed();

// Before memory is touched: asks for huge pages under its first touch. False: the kernel refused, nothing changed.
bool AdviseHugePages(const Range &range);

// Threads: every member may be called from any thread.
class HugePages {
 public:
  struct Report {
    uint64_t bytes = 0;       // looked at: the whole huge pages of what was added
    uint64_t huge_bytes = 0;  // of these, known to lie in huge pages now; what nobody has touched yet is not counted
    double seconds = 0;       // what it took, the pauses included
  };

  HugePages() = default;
  ~HugePages();
  HugePages(const HugePages &) = delete;
  HugePages &operator=(const HugePages &) = delete;

  // Registration `id` has `bytes` bytes at each address. Returns at once; of memory that other registrations hold
  // already nothing is asked again. Does nothing after Stop, or where HugePagesAllowed() is false.
  void Add(int64_t id, const std::vector<uint64_t> &addrs, uint64_t bytes);

  // From its return on, memory that no other registration holds is not touched any more: its owner may unmap it, and
  // what is mapped there next is not ours to collapse. Waits for one slice at most.
  void Remove(int64_t id);

  // Returns when all that was added so far has been worked through, or at Stop.
  Report Wait();

  // Ends the thread after the slice that it works on. Idempotent.
  void Stop();

 private:
  void Run();
  Range TakeSliceLocked();
  void SettleLocked(const Range &slice, int error);

  std::mutex mutex_;
  std::condition_variable changed_;  // of pending_, running_ and stopping_
  // All below is guarded by mutex_.
  bool stopping_ = false;
  std::map<int64_t, Ranges> registered_;  // by registration
  Ranges held_;                           // all of these together
  Ranges asked_;                          // the whole huge pages in held_
  Ranges pending_;                        // of these, what is not looked at yet
  Range running_;                         // what the thread works on, without the lock
  Report report_;
  std::chrono::steady_clock::time_point began_;  // when pending_ was last empty
  std::thread thread_;                           // started once there is something to do
};

}  // namespace datadist

#endif  // DATADIST_MEMORY_HUGE_PAGES_H_
