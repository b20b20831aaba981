#include "channel/prompt_hash.h"

namespace datadist {

void HashWords(Blake2b &hash, const TokenIds &words) { hash.Update(words.data(), words.size() * sizeof(words[0])); }

void PendingHash::Run() {
  HashWords(hash_, tokens_);
  tokens_ = {};
  done_.store(true, std::memory_order_release);
}

PromptHasher::PromptHasher() : runner_(std::make_unique<TaskRunner>(1)) {}

PromptHasher::~PromptHasher() {
  if (in_forked_child()) {
    // The thread to join exists in the parent only; memory is all there is to lose.
    [[maybe_unused]] auto *const left = runner_.release();
  }
}

std::shared_ptr<const PendingHash> PromptHasher::Begin(TokenIds tokens) {
  auto pending = std::make_shared<PendingHash>(std::move(tokens));
  const auto run = [weak = std::weak_ptr<PendingHash>(pending)] {
    if (const auto wanted = weak.lock()) {
      wanted->Run();
    }
  };
  if (in_forked_child() || !runner_->Post(run)) {
    pending->Run();
  }
  return pending;
}

}  // namespace datadist
