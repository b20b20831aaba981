#include "control/event_loop.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <condition_variable>
#include <exception>
#include <string>
#include <system_error>

#include "base/log.h"
#include "base/socket_io.h"

namespace datadist {
namespace {

// What runs out of memory costs what it was about, never the process and the links of everybody else.
template <typename Work>
void Guarded(const Work &work) {
  try {
    work();
  } catch (const std::exception &error) {
    Log(LogLevel::kError, std::string("event loop: ") + error.what());
  }
}

using llm_datadist::LLM_FAILED;

constexpr uint64_t kWakeId = 0;
constexpr int kEventsPerWait = 64;

}  // namespace

EventLoop::~EventLoop() { Stop(); }

Status EventLoop::Start() {
  epoll_ = Fd(::epoll_create1(EPOLL_CLOEXEC));
  wake_ = Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = kWakeId;
  if (!epoll_ || !wake_ || ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, wake_.get(), &event) != 0) {
    return Status(LLM_FAILED, "event loop: " + ErrnoText(errno));
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = false;
  }
  try {
    thread_ = std::thread([this] { ThreadMain(); });
  } catch (const std::system_error &error) {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    return Status(LLM_FAILED, std::string("event loop thread: ") + error.what());
  }
  return Status::Ok();
}

void EventLoop::Stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  if (thread_.joinable()) {
    Wake();
    thread_.join();
  }
  // What these hold may hold the loop's users; nothing of it may run a task any more, so order does not matter.
  std::vector<Task> tasks;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    tasks.swap(tasks_);
  }
  watches_.clear();
  timers_.clear();
  timer_times_.clear();
}

void EventLoop::Wake() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = ::write(wake_.get(), &one, sizeof(one));
}

bool EventLoop::Post(Task task) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (stopping_) {
      return false;
    }
    tasks_.push_back(std::move(task));
    if (tasks_.size() > 1) {
      return true;  // whoever put the first one has woken the loop
    }
  }
  Wake();
  return true;
}

bool EventLoop::Run(const Task &task) {
  struct Waiter {
    std::mutex mutex;
    std::condition_variable changed;
    bool ran = false;
    bool dropped = false;
  };
  // Destroyed with the task, run or not: a loop that stops first must not leave the caller waiting.
  struct Ticket {
    explicit Ticket(std::shared_ptr<Waiter> of) : waiter(std::move(of)) {}
    Ticket(const Ticket &) = delete;
    Ticket &operator=(const Ticket &) = delete;
    const std::shared_ptr<Waiter> waiter;
    ~Ticket() {
      const std::lock_guard<std::mutex> lock(waiter->mutex);
      waiter->dropped = true;
      waiter->changed.notify_one();
    }
  };
  const auto waiter = std::make_shared<Waiter>();
  const bool posted = Post([&task, waiter, ticket = std::make_shared<Ticket>(waiter)] {
    task();
    const std::lock_guard<std::mutex> lock(waiter->mutex);
    waiter->ran = true;
  });
  std::unique_lock<std::mutex> lock(waiter->mutex);
  waiter->changed.wait(lock, [&] { return waiter->dropped; });
  return posted && waiter->ran;
}

uint64_t EventLoop::WatchOnLoop(int fd, uint32_t events, Handler handler) {
  const uint64_t id = ++last_id_;
  epoll_event event{};
  event.events = events;
  event.data.u64 = id;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
    // Out of kernel memory: the owner learns it like any other failure of its descriptor.
    Post([this, id] { DispatchOnLoop(id, EPOLLERR); });
  }
  watches_.emplace(id, std::make_shared<Watch>(Watch{fd, std::move(handler)}));
  return id;
}

void EventLoop::SetEventsOnLoop(uint64_t watch, uint32_t events) {
  const auto it = watches_.find(watch);
  if (it == watches_.end()) {
    return;
  }
  epoll_event event{};
  event.events = events;
  event.data.u64 = watch;
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, it->second->fd, &event);
}

void EventLoop::UnwatchOnLoop(uint64_t watch) {
  const auto it = watches_.find(watch);
  if (it == watches_.end()) {
    return;
  }
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, it->second->fd, nullptr);
  watches_.erase(it);
}

uint64_t EventLoop::StartTimerOnLoop(Clock::time_point at, Task task) {
  const uint64_t id = ++last_id_;
  timers_.emplace(std::make_pair(at, id), std::move(task));
  timer_times_.emplace(id, at);
  return id;
}

void EventLoop::StopTimerOnLoop(uint64_t timer) {
  const auto it = timer_times_.find(timer);
  if (it != timer_times_.end()) {
    timers_.erase({it->second, timer});
    timer_times_.erase(it);
  }
}

int EventLoop::WaitMillisOnLoop() const {
  if (timers_.empty()) {
    return -1;
  }
  // Rounded up: a wait that ends a fraction of a millisecond early would spin until the timer is due.
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(timers_.begin()->first.first - Clock::now()).count();
  return static_cast<int>(std::clamp<int64_t>(left, 0, INT32_MAX));
}

void EventLoop::DispatchOnLoop(uint64_t id, uint32_t events) {
  const auto it = watches_.find(id);
  if (it == watches_.end()) {
    return;  // removed by an earlier handler of the same round
  }
  const std::shared_ptr<Watch> watch = it->second;  // the handler may remove itself
  Guarded([&] { watch->handler(events); });
}

void EventLoop::RunTasksOnLoop() {
  std::vector<Task> tasks;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    tasks.swap(tasks_);
  }
  for (Task &task : tasks) {
    Guarded(task);
    task = nullptr;
  }
}

void EventLoop::RunTimersOnLoop() {
  const Clock::time_point now = Clock::now();
  while (!timers_.empty() && timers_.begin()->first.first <= now) {
    const auto it = timers_.begin();
    const Task task = std::move(it->second);
    timer_times_.erase(it->first.second);
    timers_.erase(it);
    Guarded(task);
  }
}

void EventLoop::ThreadMain() {
  std::array<epoll_event, kEventsPerWait> events;
  while (true) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (stopping_) {
        return;
      }
    }
    const int count = ::epoll_wait(epoll_.get(), events.data(), kEventsPerWait, WaitMillisOnLoop());
    for (int i = 0; i < count; ++i) {
      if (events[static_cast<size_t>(i)].data.u64 == kWakeId) {
        uint64_t value = 0;
        [[maybe_unused]] const ssize_t size = ::read(wake_.get(), &value, sizeof(value));
      } else {
        DispatchOnLoop(events[static_cast<size_t>(i)].data.u64, events[static_cast<size_t>(i)].events);
      }
    }
    RunTasksOnLoop();
    // After the events: a peer whose bytes wait to be read is not silent, however long this process was stopped.
    RunTimersOnLoop();
  }
}

}  // namespace datadist
