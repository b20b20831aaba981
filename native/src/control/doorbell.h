// Wakes an event loop a moment later. For callers that have others waiting behind them: a thread that is woken at once
// may take the caller's core, or is one of the many that it wakes in a row.
#ifndef DATADIST_CONTROL_DOORBELL_H_
#define DATADIST_CONTROL_DOORBELL_H_

#include <algorithm>
#include <atomic>
#include <chrono>

#include "base/fd.h"
#include "base/status.h"
#include "control/event_loop.h"

namespace datadist {

class Doorbell {
 public:
  // Destroyed after the loop has stopped. The shortest delay is a microsecond: a timer of none never rings.
  Doorbell(EventLoop &loop, std::chrono::microseconds delay)
      : loop_(loop), delay_(std::max(delay, std::chrono::microseconds(1))) {}

  // LLM_FAILED when the system refuses a timer. `answer` runs on the loop, which has been started, after each ring.
  Status Install(EventLoop::Task answer);
  // From any thread, once installed: one system call at most. Rings until the answer are one.
  void Ring();

 private:
  EventLoop &loop_;
  const std::chrono::microseconds delay_;
  Fd timer_;
  std::atomic<bool> rung_{false};
};

}  // namespace datadist

#endif  // DATADIST_CONTROL_DOORBELL_H_
