// The digest of a prompt, which P and D compare, read beside the thread that asks for it: that of a hundred thousand
// tokens takes a millisecond, and a scheduler's thread has every running request behind it.
//
// Threads: any for a PromptHasher and for PendingHash::done; a hash that is done belongs to whoever asked.
#ifndef DATADIST_CHANNEL_PROMPT_HASH_H_
#define DATADIST_CHANNEL_PROMPT_HASH_H_

#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "base/blake2b.h"
#include "base/task_runner.h"

namespace datadist {

using TokenIds = std::vector<int64_t>;

// Each as eight bytes, the lowest first, which is how this machine has them.
void HashWords(Blake2b &hash, const TokenIds &words);

class PendingHash {
 public:
  explicit PendingHash(TokenIds tokens) : tokens_(std::move(tokens)) {}
  bool done() const { return done_.load(std::memory_order_acquire); }
  // Once done.
  const Blake2b &hash() const { return hash_; }

 private:
  friend class PromptHasher;
  void Run();

  TokenIds tokens_;
  Blake2b hash_;
  std::atomic<bool> done_{false};
};

class PromptHasher {
 public:
  // Dropped by its last owner before its turn has come, it costs nothing. Where there is no thread for it, and in a
  // forked child, which has none, it is done at once.
  std::shared_ptr<const PendingHash> Begin(TokenIds tokens);
  // Waits for the one that is being read.
  void Close() { runner_->Stop(); }
  ~PromptHasher();
  PromptHasher();
  PromptHasher(const PromptHasher &) = delete;
  PromptHasher &operator=(const PromptHasher &) = delete;
  bool in_forked_child() const { return ::getpid() != pid_; }

 private:
  const pid_t pid_ = ::getpid();
  std::unique_ptr<TaskRunner> runner_;
};

}  // namespace datadist

#endif  // DATADIST_CHANNEL_PROMPT_HASH_H_
