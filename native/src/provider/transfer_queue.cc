#include "provider/transfer_queue.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <new>
#include <optional>
#include <set>
#include <system_error>
#include <thread>
#include <utility>

#include "base/fd.h"
#include "provider/lanes.h"
#include "provider/operation.h"

namespace datadist {
namespace {

using Clock = WaitingOp::Clock;

// Far enough to mean "no deadline", near enough that adding it to the clock cannot overflow.
constexpr std::chrono::milliseconds kLongestWait = std::chrono::hours(24 * 365);

std::chrono::milliseconds Bounded(std::chrono::milliseconds span) {
  return std::clamp(span, std::chrono::milliseconds::zero(), kLongestWait);
}

struct ClusterOf {
  uint64_t operator()(const PullBlocksOp &op) const { return op.transfer.remote.cluster_id; }
  uint64_t operator()(const PushBlocksOp &op) const { return op.transfer.remote.cluster_id; }
  uint64_t operator()(const LinkOp &op) const { return op.cluster.remote_cluster_id; }
  uint64_t operator()(const UnlinkOp &op) const { return op.cluster.remote_cluster_id; }
  uint64_t operator()(const RefusedOp &op) const { return op.cluster_id; }
};

// Null where the operation moves no blocks.
BlocksTransfer *TransferOf(Operation &operation) {
  if (auto *const pull = std::get_if<PullBlocksOp>(&operation)) {
    return &pull->transfer;
  }
  auto *const push = std::get_if<PushBlocksOp>(&operation);
  return push != nullptr ? &push->transfer : nullptr;
}

struct Execute {
  Provider &provider;

  Status operator()(const PullBlocksOp &op) const { return provider.PullKvBlocks(op.transfer); }
  Status operator()(const PushBlocksOp &op) const { return provider.PushKvBlocks(op.transfer); }
  Status operator()(const LinkOp &op) const {
    std::vector<llm_datadist::Status> rets;
    return provider.Link({op.cluster}, rets, op.timeout_ms);
  }
  Status operator()(const UnlinkOp &op) const {
    std::vector<llm_datadist::Status> rets;
    return provider.Unlink({op.cluster}, rets, op.timeout_ms, op.force);
  }
  Status operator()(const RefusedOp &op) const { return op.status; }
};

Status RunOperation(Provider &provider, const Operation &operation) {
  try {
    return std::visit(Execute{provider}, operation);
  } catch (const std::bad_alloc &) {
    return Status(llm_datadist::LLM_OUT_OF_MEMORY, "out of memory while running the operation");
  }
}

}  // namespace

class TransferQueue::State {
 public:
  State(std::shared_ptr<Provider> provider, size_t width, size_t capacity, std::chrono::milliseconds patience, Fd event)
      : provider_(std::move(provider)),
        width_(width),
        capacity_(capacity),
        patience_(Bounded(patience)),
        event_(std::move(event)) {}

  void StartThreads() {
    timer_thread_ = std::thread([this] { TimerLoop(); });
    const std::lock_guard<std::mutex> lock(mutex_);
    workers_.reserve(kMaxThreads);
    while (workers_.size() < width_) {
      workers_.emplace_back([this] { WorkerLoop(); });
    }
  }

  Submission Submit(Operation operation, std::chrono::milliseconds deadline) {
    WaitingOp op;
    op.cluster_id = std::visit(ClusterOf{}, operation);
    op.operation = std::move(operation);
    op.submitted = Clock::now();
    op.deadline = op.submitted + Bounded(deadline);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) {
      return {Verdict::kClosed, 0};
    }
    if (lanes_.waiting() + running_ >= capacity_) {
      return {Verdict::kFull, 0};
    }
    op.id = ++last_id_;
    const auto next = lanes_.NextDeadline();
    const bool sooner = !next || op.deadline < *next;
    lanes_.Add(std::move(op));
    StartNextLocked();
    if (sooner) {
      timer_.notify_one();
    }
    return {Verdict::kAccepted, last_id_};
  }

  std::vector<Completion> Poll() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!completions_.empty()) {
      uint64_t count = 0;
      (void)!::read(event_.get(), &count, sizeof(count));
    }
    return std::exchange(completions_, {});
  }

  bool Cancel(uint64_t id) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::optional<WaitingOp> op = lanes_.Remove(id);
    if (op) {
      CompleteCancelled(*op);
    }
    return op.has_value();
  }

  bool Drain(std::chrono::milliseconds timeout) {
    std::unique_lock<std::mutex> lock(mutex_);
    RefuseAndCancel();
    return idle_.wait_until(lock, Clock::now() + Bounded(timeout), [this] { return running_ == 0; });
  }

  void Close() {
    const std::lock_guard<std::mutex> one_closer(join_mutex_);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      RefuseAndCancel();
      work_.notify_all();
      timer_.notify_all();
    }
    if (timer_thread_.joinable()) {
      timer_thread_.join();
    }
    for (std::thread &worker : workers_) {  // closed: there will be no more
      worker.join();
    }
    workers_.clear();
  }

  bool in_forked_child() const { return ::getpid() != pid_; }
  size_t capacity() const { return capacity_; }
  int event_fd() const { return event_.get(); }

 private:
  void WorkerLoop() {
    const Status entered = provider_->EnterThread();
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      work_.wait(lock, [this] { return closed_ || (lanes_.CanStart() && HasTurnLocked()); });
      std::optional<WaitingOp> op = lanes_.Start();
      if (!op) {
        return;  // closed, and nothing can be added any more
      }
      RunOne(std::move(*op), entered, lock);
    }
  }

  void RunOne(WaitingOp op, const Status &entered, std::unique_lock<std::mutex> &lock) {
    const auto started = Clock::now();
    if (op.deadline <= started) {
      CompleteExpired(op);
      lanes_.Finish(op.cluster_id);
    } else {
      ++running_;
      prompt_.emplace(started, op.id);
      StartNextLocked();
      lock.unlock();
      if (BlocksTransfer *const transfer = TransferOf(op.operation)) {
        transfer->time_left = std::chrono::ceil<std::chrono::milliseconds>(op.deadline - started);
      }
      const Status status = entered.ok() ? RunOperation(*provider_, op.operation) : entered;
      const auto ended = Clock::now();
      op.operation = RefusedOp{};  // frees the block lists outside the lock
      lock.lock();
      prompt_.erase({started, op.id});
      --running_;
      lanes_.Finish(op.cluster_id);
      Complete({op.id, status.code(), false, status.text(), started - op.submitted, ended - started});
    }
    StartNextLocked();
    if (running_ == 0) {
      idle_.notify_all();
    }
  }

  bool HasTurnLocked() const { return prompt_.size() < width_; }

  // Wakes whoever can start what waits: a thread, a new one where all wait for peers, or the timer, to say when they do.
  void StartNextLocked() {
    if (!lanes_.CanStart()) {
      return;
    }
    if (!HasTurnLocked()) {
      timer_.notify_one();
      return;
    }
    if (running_ == workers_.size() && workers_.size() < size_t{kMaxThreads} && !closed_) {
      try {
        workers_.emplace_back([this] { WorkerLoop(); });
      } catch (const std::system_error &) {
        // The system has no more threads to give: it is started by the next that is free.
      }
    }
    work_.notify_one();
  }

  void TimerLoop() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!closed_) {
      for (const WaitingOp &op : lanes_.RemoveExpired(Clock::now())) {
        CompleteExpired(op);
      }
      auto next = lanes_.NextDeadline();
      if (lanes_.CanStart() && !HasTurnLocked()) {
        const auto stalled = prompt_.begin()->first + patience_;
        if (stalled <= Clock::now()) {
          prompt_.erase(prompt_.begin());
          StartNextLocked();
          continue;
        }
        next = std::min(stalled, next.value_or(stalled));
      }
      if (next) {
        timer_.wait_until(lock, *next);
      } else {
        timer_.wait(lock);
      }
    }
  }

  void RefuseAndCancel() {
    closed_ = true;
    for (const WaitingOp &op : lanes_.RemoveAll()) {
      CompleteCancelled(op);
    }
  }

  void CompleteExpired(const WaitingOp &op) {
    Complete({op.id, llm_datadist::LLM_TIMEOUT, true, "the deadline passed before the operation started",
              Clock::now() - op.submitted, {}});
  }

  void CompleteCancelled(const WaitingOp &op) {
    Complete({op.id, llm_datadist::LLM_FAILED, true, "cancelled before it started", Clock::now() - op.submitted, {}});
  }

  void Complete(Completion completion) {
    if (completions_.empty()) {
      const uint64_t one = 1;
      (void)!::write(event_.get(), &one, sizeof(one));
    }
    completions_.push_back(std::move(completion));
  }

  const std::shared_ptr<Provider> provider_;
  const size_t width_;
  const size_t capacity_;
  const std::chrono::milliseconds patience_;
  const Fd event_;
  const pid_t pid_ = ::getpid();

  std::mutex mutex_;
  std::condition_variable work_;   // a lane can start and has a turn, or closed
  std::condition_variable timer_;  // an earlier deadline, a lane that can start but has no turn, or closed
  std::condition_variable idle_;   // nothing runs
  Lanes lanes_;
  std::vector<Completion> completions_;
  uint64_t last_id_ = 0;
  size_t running_ = 0;
  std::set<std::pair<Clock::time_point, uint64_t>> prompt_;  // those that run, since when, and are not taken for stalled
  bool closed_ = false;
  std::vector<std::thread> workers_;  // grows until closed

  std::mutex join_mutex_;  // taken before mutex_
  std::thread timer_thread_;
};

Result<std::unique_ptr<TransferQueue>> TransferQueue::Create(std::shared_ptr<Provider> provider, int64_t threads,
                                                             int64_t capacity, std::chrono::milliseconds patience) {
  if (threads < 1 || threads > kMaxThreads) {
    return Status(llm_datadist::LLM_PARAM_INVALID,
                  "threads is " + std::to_string(threads) + "; allowed: 1.." + std::to_string(kMaxThreads));
  }
  if (capacity < 1 || capacity > kMaxCapacity) {
    return Status(llm_datadist::LLM_PARAM_INVALID,
                  "capacity is " + std::to_string(capacity) + "; allowed: 1.." + std::to_string(kMaxCapacity));
  }
  Fd event(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!event) {
    return Status(llm_datadist::LLM_FAILED, std::string("eventfd: ") + std::strerror(errno));
  }
  std::unique_ptr<TransferQueue> queue(
      new TransferQueue(std::make_unique<State>(std::move(provider), static_cast<size_t>(threads),
                                                static_cast<size_t>(capacity), patience, std::move(event))));
  try {
    queue->state_->StartThreads();
  } catch (const std::system_error &error) {
    return Status(llm_datadist::LLM_FAILED, std::string("starting threads: ") + error.what());
  }
  return queue;
}

TransferQueue::TransferQueue(std::unique_ptr<State> state) : state_(std::move(state)) {}

TransferQueue::~TransferQueue() {
  if (state_->in_forked_child()) {
    // The threads to join and the holder of a locked mutex exist in the parent only; memory is all there is to lose.
    (void)state_.release();
    return;
  }
  state_->Close();
}

TransferQueue::Submission TransferQueue::Submit(Operation operation, std::chrono::milliseconds deadline) {
  return state_->Submit(std::move(operation), deadline);
}
std::vector<Completion> TransferQueue::Poll() { return state_->Poll(); }
bool TransferQueue::Cancel(uint64_t id) { return state_->Cancel(id); }
bool TransferQueue::Drain(std::chrono::milliseconds timeout) { return state_->Drain(timeout); }
void TransferQueue::Close() { state_->Close(); }
size_t TransferQueue::capacity() const { return state_->capacity(); }
int TransferQueue::event_fd() const { return state_->event_fd(); }
bool TransferQueue::in_forked_child() const { return state_->in_forked_child(); }

}  // namespace datadist
