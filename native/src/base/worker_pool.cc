#include "base/worker_pool.h"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace datadist {

struct WorkerPool::State {
  // One Run call, on its caller's stack: it ends only when no thread uses it any more. All members are guarded by the
  // pool's mutex, but for `part`, which does not change.
  struct Job {
    const std::function<void(size_t)> &part;
    size_t count;
    size_t next = 0;  // first part that nobody took
    size_t ended = 0;
    std::exception_ptr failure;  // of the first part that threw, for the caller
    std::condition_variable all_ended;
  };

  std::mutex mutex;
  std::condition_variable work;
  std::deque<Job *> jobs;  // those with parts that nobody took
  bool stopping = false;
  std::vector<std::thread> threads;

  // Takes and runs one part of `job`; the lock is held before and after.
  void RunPart(Job &job, std::unique_lock<std::mutex> &lock) {
    const size_t index = job.next++;
    if (job.next == job.count) {
      jobs.erase(std::find(jobs.begin(), jobs.end(), &job));
    }
    lock.unlock();
    std::exception_ptr failure;
    try {
      job.part(index);
    } catch (...) {
      failure = std::current_exception();
    }
    lock.lock();
    if (failure && !job.failure) {
      job.failure = failure;
    }
    if (++job.ended == job.count) {
      job.all_ended.notify_all();  // under the lock: the job dies as soon as its caller sees the count
    }
  }

  void Work() {
    std::unique_lock<std::mutex> lock(mutex);
    while (true) {
      work.wait(lock, [this] { return stopping || !jobs.empty(); });
      if (stopping) {
        return;
      }
      RunPart(*jobs.front(), lock);
    }
  }
};

WorkerPool::WorkerPool(size_t width) : width_(std::max<size_t>(width, 1)), state_(std::make_unique<State>()) {
  for (size_t i = 1; i < width_; ++i) {
    try {
      state_->threads.emplace_back([state = state_.get()] { state->Work(); });
    } catch (const std::system_error &) {
      break;  // the system has no more threads to give: the pool is slower, not wrong
    }
  }
}

WorkerPool::~WorkerPool() {
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->stopping = true;
  }
  state_->work.notify_all();
  for (std::thread &thread : state_->threads) {
    thread.join();
  }
}

void WorkerPool::Run(size_t count, const std::function<void(size_t)> &part) {
  if (count == 0) {
    return;
  }
  if (count == 1) {
    part(0);
    return;
  }
  State::Job job{part, count, 0, 0, nullptr, {}};
  std::unique_lock<std::mutex> lock(state_->mutex);
  state_->jobs.push_back(&job);
  for (size_t i = std::min(count - 1, state_->threads.size()); i > 0; --i) {
    state_->work.notify_one();
  }
  while (job.next < job.count) {
    state_->RunPart(job, lock);
  }
  job.all_ended.wait(lock, [&job] { return job.ended == job.count; });
  if (job.failure) {
    std::rethrow_exception(job.failure);
  }
}

}  // namespace datadist
