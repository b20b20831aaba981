// A point in time by which a step must have ended. Monotonic, local to the process: it crosses the wire only as
// remaining milliseconds.
#ifndef DATADIST_BASE_DEADLINE_H_
#define DATADIST_BASE_DEADLINE_H_

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>

namespace datadist {

class Deadline {
 public:
  using Clock = std::chrono::steady_clock;

  static Deadline In(std::chrono::milliseconds span) { return Deadline(Clock::now() + span); }
  static Deadline Earlier(Deadline a, Deadline b) { return a.at_ < b.at_ ? a : b; }

  bool Expired() const { return Clock::now() >= at_; }
  Clock::time_point at() const { return at_; }

  // Rounded up; 0 when expired.
  std::chrono::milliseconds Remaining() const {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(at_ - Clock::now());
    return std::max(left, std::chrono::milliseconds::zero());
  }
  // For the wire: never 0, which the peer would take for no time at all.
  uint32_t WireMillis() const {
    return static_cast<uint32_t>(std::clamp<int64_t>(Remaining().count(), 1, std::numeric_limits<uint32_t>::max()));
  }
  // For a poll(), which may end before the deadline: its int is short. 0 only when expired, so that a loop of polls does
  // not spin through the last millisecond.
  int PollMillis() const {
    return static_cast<int>(std::min<int64_t>(Remaining().count(), std::numeric_limits<int>::max()));
  }

 private:
  explicit Deadline(Clock::time_point at) : at_(at) {}
  Clock::time_point at_;
};

}  // namespace datadist

#endif  // DATADIST_BASE_DEADLINE_H_
