// A few threads that run what may block, in the order in which it came. A thread is started when there is work for it,
// and sleeps when there is none.
#ifndef DATADIST_BASE_TASK_RUNNER_H_
#define DATADIST_BASE_TASK_RUNNER_H_

#include <cstddef>
#include <functional>
#include <memory>

namespace datadist {

class TaskRunner {
 public:
  using Task = std::function<void()>;

  explicit TaskRunner(size_t max_threads);
  ~TaskRunner();  // Stop
  TaskRunner(const TaskRunner &) = delete;
  TaskRunner &operator=(const TaskRunner &) = delete;

  // False, and the task is dropped, once stopping, or where the system has no thread for it. A task that throws is
  // logged, and costs nobody else.
  bool Post(Task task);
  // Drops the tasks that wait, waits for those that run; from a task, for the others. Idempotent.
  void Stop();

 private:
  struct State;
  const std::shared_ptr<State> state_;  // of the threads too: a task may drop the last owner of its runner
};

}  // namespace datadist

#endif  // DATADIST_BASE_TASK_RUNNER_H_
