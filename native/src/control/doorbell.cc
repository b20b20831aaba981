#include "control/doorbell.h"

#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <utility>

#include "base/socket_io.h"

namespace datadist {

Status Doorbell::Install(EventLoop::Task answer) {
  timer_ = Fd(::timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC));
  if (!timer_) {
    return Status(llm_datadist::LLM_FAILED, "timerfd: " + ErrnoText(errno));
  }
  loop_.Post([this, answer = std::move(answer)] {
    loop_.WatchOnLoop(timer_.get(), EPOLLIN, [this, answer](uint32_t) {
      uint64_t count = 0;
      [[maybe_unused]] const ssize_t size = ::read(timer_.get(), &count, sizeof(count));
      // First: what comes while it is being answered rings again.
      rung_ = false;
      answer();
    });
  });
  return Status::Ok();
}

void Doorbell::Ring() {
  if (rung_.exchange(true)) {
    return;
  }
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(delay_);
  itimerspec at{};
  at.it_value.tv_sec = seconds.count();
  at.it_value.tv_nsec = std::chrono::nanoseconds(delay_ - seconds).count();
  ::timerfd_settime(timer_.get(), 0, &at, nullptr);
}

}  // namespace datadist
