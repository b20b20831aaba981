// A few threads that share the copying of one large transfer. Idle threads sleep: an idle engine uses no CPU.
#ifndef DATADIST_BASE_WORKER_POOL_H_
#define DATADIST_BASE_WORKER_POOL_H_

#include <cstddef>
#include <functional>
#include <memory>

namespace datadist {

class WorkerPool {
 public:
  // `width` counts the calling thread: a pool of 1 starts no thread.
  explicit WorkerPool(size_t width);
  ~WorkerPool();
  WorkerPool(const WorkerPool &) = delete;
  WorkerPool &operator=(const WorkerPool &) = delete;

  size_t width() const { return width_; }

  // Runs part(0) ... part(count - 1), each once, on the caller and on whatever pool threads are free, and returns when
  // all ended; what one of them threw is thrown here. May be called by several threads at once; none waits for another's parts.
  void Run(size_t count, const std::function<void(size_t)> &part);

 private:
  struct State;
  size_t width_;
  std::unique_ptr<State> state_;
};

}  // namespace datadist

#endif  // DATADIST_BASE_WORKER_POOL_H_
