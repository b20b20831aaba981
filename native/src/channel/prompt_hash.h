// The digest of a prompt, which P and D compare, read beside the thread that asks for it: that of a hundred thousand
// tokens takes most of a millisecond, and a scheduler's thread has every running request behind it.
//
// Threads: any.
#ifndef DATADIST_CHANNEL_PROMPT_HASH_H_
#define DATADIST_CHANNEL_PROMPT_HASH_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "base/blake2b.h"
#include "base/process_epoch.h"
#include "channel/id_text.h"
#include "control/doorbell.h"
#include "control/event_loop.h"

namespace datadist {

class PendingHash {
 public:
  explicit PendingHash(IdText tokens) : tokens_(std::move(tokens)) {}
  bool done() const { return done_.load(std::memory_order_acquire); }
  // Once done.
  const Blake2b &hash() const { return hash_; }

 private:
  friend class PromptHasher;
  void Run();

  IdText tokens_;
  Blake2b hash_;
  std::atomic<bool> done_{false};
};

class PromptHasher {
 public:
  PromptHasher();
  ~PromptHasher();  // Close
  PromptHasher(const PromptHasher &) = delete;
  PromptHasher &operator=(const PromptHasher &) = delete;

  // Wakes no thread: it is begun a moment later. Dropped by its last owner before its turn has come, it costs nothing.
  // Where there is no thread for it (the system has none, it was closed, this is a forked child) it is done at once.
  std::shared_ptr<const PendingHash> Begin(IdText tokens);
  // Drops what waits, waits for the one that is being read. Idempotent.
  void Close();
  bool in_forked_child() const { return ProcessEpoch() != epoch_; }

 private:
  struct State {
    EventLoop loop;
    Doorbell doorbell;
    std::mutex mutex;
    std::vector<std::weak_ptr<PendingHash>> waiting;  // guarded by mutex
    bool started = false;                             // guarded by mutex
    std::atomic<bool> closed{false};

    State();
    bool Add(const std::shared_ptr<PendingHash> &pending);
    void RunOnLoop();
  };
  const uint64_t epoch_ = ProcessEpoch();
  std::unique_ptr<State> state_;
};

}  // namespace datadist

#endif  // DATADIST_CHANNEL_PROMPT_HASH_H_
