// One transfer at a time on a link, others wait no longer than their deadline; and a way to be told when the last one
// is over and no other will start.
#ifndef DATADIST_LINK_TURN_GATE_H_
#define DATADIST_LINK_TURN_GATE_H_

#include <condition_variable>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

#include "base/deadline.h"

namespace datadist {

enum class EnterResult { kEntered, kTimeout, kShut };

class TurnGate {
 public:
  EnterResult Enter(Deadline deadline) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_until(lock, deadline.at(), [this] { return shut_ || !busy_; });
    if (shut_) {
      return EnterResult::kShut;
    }
    if (busy_) {
      return EnterResult::kTimeout;
    }
    busy_ = true;
    return EnterResult::kEntered;
  }

  void Leave() {
    std::vector<std::function<void()>> waiters;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      busy_ = false;
      waiters.swap(waiters_);
      changed_.notify_one();
    }
    for (const auto &waiter : waiters) {
      waiter();
    }
  }

  // Nobody enters any more; `done` runs once nobody is inside: now, or on the thread that leaves.
  void Shut(std::function<void()> done) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      shut_ = true;
      changed_.notify_all();
      if (busy_) {
        waiters_.push_back(std::move(done));
        return;
      }
    }
    done();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool busy_ = false;                           // guarded by mutex_
  bool shut_ = false;                           // guarded by mutex_
  std::vector<std::function<void()>> waiters_;  // guarded by mutex_
};

// Leaves the gate at the end of the scope that entered it.
class Turn {
 public:
  explicit Turn(TurnGate &gate) : gate_(gate) {}
  ~Turn() { gate_.Leave(); }
  Turn(const Turn &) = delete;
  Turn &operator=(const Turn &) = delete;

 private:
  TurnGate &gate_;
};

}  // namespace datadist

#endif  // DATADIST_LINK_TURN_GATE_H_
