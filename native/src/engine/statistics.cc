#include "engine/statistics.h"

#include "base/log.h"

namespace datadist {
namespace {

constexpr std::array<const char *, 4> kNames = {"links", "unlinks", "pulls", "pushes"};

}  // namespace

void Statistics::Add(Call kind, bool ok, std::chrono::steady_clock::duration took) {
  Counter &counter = counters_[static_cast<size_t>(kind)];
  const auto us = static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(took).count());
  counter.calls.fetch_add(1, std::memory_order_relaxed);
  counter.failures.fetch_add(ok ? 0 : 1, std::memory_order_relaxed);
  counter.total_us.fetch_add(us, std::memory_order_relaxed);
  uint64_t longest = counter.longest_us.load(std::memory_order_relaxed);
  while (longest < us && !counter.longest_us.compare_exchange_weak(longest, us, std::memory_order_relaxed)) {
  }
}

uint64_t Statistics::TotalCalls() const {
  uint64_t total = 0;
  for (const Counter &counter : counters_) {
    total += counter.calls.load(std::memory_order_relaxed);
  }
  return total;
}

std::string Statistics::Text() const {
  std::string text;
  for (size_t i = 0; i < counters_.size(); ++i) {
    const uint64_t calls = counters_[i].calls.load(std::memory_order_relaxed);
    if (calls != 0) {
      text += std::string(text.empty() ? "" : ", ") + kNames[i] + " " + std::to_string(calls) + " (" +
              std::to_string(counters_[i].failures.load(std::memory_order_relaxed)) + " failed, mean " +
              std::to_string(counters_[i].total_us.load(std::memory_order_relaxed) / calls) + " us, longest " +
              std::to_string(counters_[i].longest_us.load(std::memory_order_relaxed)) + " us)";
    }
  }
  return text.empty() ? "no calls" : text;
}

void Statistics::StartOnLoop(EventLoop *loop, std::chrono::milliseconds interval) {
  if (!LogEnabled(LogLevel::kInfo)) {
    return;
  }
  loop->StartTimerOnLoop(EventLoop::Clock::now() + interval, [weak = weak_from_this(), loop, interval] {
    if (const std::shared_ptr<Statistics> self = weak.lock()) {
      if (self->TotalCalls() != self->logged_calls_) {
        self->Log();
      }
      self->StartOnLoop(loop, interval);
    }
  });
}

void Statistics::Log() {
  logged_calls_ = TotalCalls();
  datadist::Log(LogLevel::kInfo, "cluster " + std::to_string(cluster_id_) + ": " + Text());
}

}  // namespace datadist
