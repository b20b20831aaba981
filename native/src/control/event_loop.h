// One thread that waits for sockets, timers and posted tasks, and sleeps otherwise.
//
// Methods that end in OnLoop run on that thread only; so do all handlers. A handler may remove any registration, its
// own included. Registrations are numbers that are never reused, so that an event of a closed descriptor cannot reach
// the handler of a new one with the same number.
#ifndef DATADIST_CONTROL_EVENT_LOOP_H_
#define DATADIST_CONTROL_EVENT_LOOP_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/fd.h"
#include "base/status.h"

namespace datadist {

class EventLoop {
 public:
  using Task = std::function<void()>;
  using Handler = std::function<void(uint32_t events)>;
  using Clock = std::chrono::steady_clock;

  EventLoop() = default;
  ~EventLoop();
  EventLoop(const EventLoop &) = delete;
  EventLoop &operator=(const EventLoop &) = delete;

  Status Start();
  // Joins the thread, then drops handlers, timers and tasks. Idempotent. Not on the loop.
  void Stop();

  // From any thread. False, and the task is dropped, once the loop is stopping.
  bool Post(Task task);
  // Post and wait until it ran. Not on the loop.
  bool Run(const Task &task);

  uint64_t WatchOnLoop(int fd, uint32_t events, Handler handler);
  void SetEventsOnLoop(uint64_t watch, uint32_t events);
  void UnwatchOnLoop(uint64_t watch);

  uint64_t StartTimerOnLoop(Clock::time_point at, Task task);
  void StopTimerOnLoop(uint64_t timer);

 private:
  struct Watch {
    int fd;
    Handler handler;
  };
  void ThreadMain();
  void DispatchOnLoop(uint64_t id, uint32_t events);
  void RunTasksOnLoop();
  void RunTimersOnLoop();
  int WaitMillisOnLoop() const;
  void Wake();

  Fd epoll_;
  Fd wake_;
  std::thread thread_;

  std::mutex mutex_;
  std::vector<Task> tasks_;  // guarded by mutex_
  bool stopping_ = true;     // guarded by mutex_; a loop that was not started takes no tasks

  // Owned by the loop thread.
  uint64_t last_id_ = 0;
  std::unordered_map<uint64_t, std::shared_ptr<Watch>> watches_;
  std::map<std::pair<Clock::time_point, uint64_t>, Task> timers_;
  std::unordered_map<uint64_t, Clock::time_point> timer_times_;
};

}  // namespace datadist

#endif  // DATADIST_CONTROL_EVENT_LOOP_H_
