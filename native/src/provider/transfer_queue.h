// Runs the blocking calls of a Provider on a bounded pool of threads.
//
//   Submit ──> lane of its cluster (FIFO) ──> worker, one per lane at a time ──> Completion ──> Poll
//                    │        │                                                      ▲
//                    │        └── Cancel, Drain: cancelled, LLM_FAILED ──────────────┤
//                    └── deadline passed: cancelled, LLM_TIMEOUT ────────────────────┘
//
// Contract:
//   - Every accepted id appears in exactly one Completion, also when the queue is drained or closed under it.
//   - Operations to one cluster run one at a time, in order of submission; different clusters run in parallel. The
//     engine would serialise them per link anyway: a lane keeps one slow peer from taking every thread.
//   - At most `threads` operations run at once, but for those that have run for `patience`: they wait for a peer, and
//     peers that do not answer must not cost others their turn. For those that wait instead there are more threads, up
//     to kMaxThreads in all, started when they are needed.
//   - An operation that has not started at its deadline completes then, whether or not a thread is free, and as
//     cancelled: it says nothing of the link. One that has started runs to its end, which the provider's own timeouts
//     bound, and that of a transfer its deadline, too (BlocksTransfer::time_left).
//   - Completions that were not polled yet do not count against the capacity.
//
// Threads: every member may be called from any thread. The pool never calls back into its user: completions are polled
// for, and event_fd() is readable exactly while some wait. After fork() the child has the object but not its threads:
// it may only destroy it.
#ifndef DATADIST_PROVIDER_TRANSFER_QUEUE_H_
#define DATADIST_PROVIDER_TRANSFER_QUEUE_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "provider/operation.h"
#include "provider/provider.h"

namespace datadist {

struct Completion {
  uint64_t id = 0;
  llm_datadist::Status status = llm_datadist::LLM_SUCCESS;
  bool cancelled = false;
  std::string error;
  std::chrono::duration<double> queued{0};
  std::chrono::duration<double> run{0};
};

class TransferQueue {
 public:
  static constexpr int64_t kMaxThreads = 64;
  static constexpr int64_t kMaxCapacity = 1 << 20;
  // Longer than most transfers take, shorter than anybody minds.
  static constexpr std::chrono::milliseconds kPatience{20};

  // LLM_PARAM_INVALID for a size out of range, LLM_FAILED when the system refuses threads or the eventfd.
  static Result<std::unique_ptr<TransferQueue>> Create(std::shared_ptr<Provider> provider, int64_t threads,
                                                       int64_t capacity,
                                                       std::chrono::milliseconds patience = kPatience);
  ~TransferQueue();  // Close
  TransferQueue(const TransferQueue &) = delete;
  TransferQueue &operator=(const TransferQueue &) = delete;

  enum class Verdict { kAccepted, kFull, kClosed };
  struct Submission {
    Verdict verdict;
    uint64_t id;  // counts from 1; 0 unless accepted
  };
  Submission Submit(Operation operation, std::chrono::milliseconds deadline);

  // What completed since the last call, oldest first.
  std::vector<Completion> Poll();

  // True if the operation had not started: it completes as cancelled.
  bool Cancel(uint64_t id);

  // Refuses new operations, cancels those that have not started, waits for those that run. True if none is left.
  bool Drain(std::chrono::milliseconds timeout);

  // Drain without a timeout, then joins the threads. Completions can still be polled.
  void Close();

  size_t capacity() const;
  int event_fd() const;
  bool in_forked_child() const;

 private:
  class State;
  explicit TransferQueue(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace datadist

#endif  // DATADIST_PROVIDER_TRANSFER_QUEUE_H_
