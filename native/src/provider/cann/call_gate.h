// Lets calls into a library that must not be finalized beside them.
#ifndef DATADIST_PROVIDER_CANN_CALL_GATE_H_
#define DATADIST_PROVIDER_CANN_CALL_GATE_H_

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace datadist::cann {

class CallGate {
 public:
  void Open() {
    const std::lock_guard<std::mutex> lock(mutex_);
    open_ = true;
  }
  // Refuses new calls and waits for those that run. False if some still do after `patience`.
  bool Close(std::chrono::milliseconds patience) {
    std::unique_lock<std::mutex> lock(mutex_);
    open_ = false;
    return idle_.wait_for(lock, patience, [this] { return running_ == 0; });
  }

  // One call, from before it begins until it has ended; false if the gate is closed.
  class Pass {
   public:
    explicit Pass(CallGate &gate) : gate_(gate), admitted_(gate.Enter()) {}
    ~Pass() {
      if (admitted_) {
        gate_.Leave();
      }
    }
    Pass(const Pass &) = delete;
    Pass &operator=(const Pass &) = delete;
    explicit operator bool() const { return admitted_; }

   private:
    CallGate &gate_;
    const bool admitted_;
  };

 private:
  bool Enter() {
    const std::lock_guard<std::mutex> lock(mutex_);
    running_ += open_ ? 1 : 0;
    return open_;
  }
  void Leave() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--running_ == 0) {
      idle_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable idle_;
  bool open_ = false;
  uint64_t running_ = 0;
};

}  // namespace datadist::cann

#endif  // DATADIST_PROVIDER_CANN_CALL_GATE_H_
