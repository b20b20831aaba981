#include "base/task_runner.h"

#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "base/log.h"

namespace datadist {

struct TaskRunner::State {
  const size_t max_threads;
  std::mutex mutex;
  std::condition_variable work;
  std::deque<Task> tasks;
  std::vector<std::thread> threads;
  size_t idle = 0;
  bool stopping = false;

  explicit State(size_t limit) : max_threads(limit) {}

  void Work() {
    std::unique_lock<std::mutex> lock(mutex);
    while (true) {
      ++idle;
      work.wait(lock, [this] { return stopping || !tasks.empty(); });
      --idle;
      if (stopping) {
        return;
      }
      Task task = std::move(tasks.front());
      tasks.pop_front();
      lock.unlock();
      RunOne(std::move(task));
      lock.lock();
    }
  }

  static void RunOne(Task task) {
    try {
      task();
    } catch (const std::exception &error) {
      Log(LogLevel::kError, std::string("a task failed: ") + error.what());
    }
  }
};

TaskRunner::TaskRunner(size_t max_threads) : state_(std::make_shared<State>(max_threads)) {}

TaskRunner::~TaskRunner() { Stop(); }

bool TaskRunner::Post(Task task) {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  if (state_->stopping) {
    return false;
  }
  if (state_->tasks.size() >= state_->idle && state_->threads.size() < state_->max_threads) {
    try {
      state_->threads.emplace_back([state = state_] { state->Work(); });
    } catch (const std::system_error &) {
      if (state_->threads.empty()) {
        return false;
      }
    }
  }
  state_->tasks.push_back(std::move(task));
  state_->work.notify_one();
  return true;
}

void TaskRunner::Stop() {
  std::vector<std::thread> threads;
  std::deque<Task> dropped;  // destroyed after the lock is gone
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->stopping = true;
    threads.swap(state_->threads);
    dropped.swap(state_->tasks);
  }
  state_->work.notify_all();
  for (std::thread &thread : threads) {
    if (thread.get_id() == std::this_thread::get_id()) {
      thread.detach();
    } else {
      thread.join();
    }
  }
}

}  // namespace datadist
