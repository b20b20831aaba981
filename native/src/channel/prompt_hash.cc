#include "channel/prompt_hash.h"

#include <chrono>

namespace datadist {
namespace {

// Longer than the hooks of a step take, and shorter than a step.
constexpr std::chrono::microseconds kPause{500};

}  // namespace

void PendingHash::Run() {
  HashIds(hash_, tokens_);
  tokens_ = {};
  done_.store(true, std::memory_order_release);
}

PromptHasher::State::State() : doorbell(loop, kPause) {}

// The thread starts with the first prompt: many instances have none that is long.
bool PromptHasher::State::Add(const std::shared_ptr<PendingHash> &pending) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!started && !closed) {
    started = loop.Start().ok() && doorbell.Install([this] { RunOnLoop(); }).ok();
  }
  if (!started || closed) {
    return false;
  }
  waiting.push_back(pending);
  doorbell.Ring();
  return true;
}

void PromptHasher::State::RunOnLoop() {
  std::vector<std::weak_ptr<PendingHash>> now;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    now.swap(waiting);
  }
  for (const std::weak_ptr<PendingHash> &each : now) {
    const std::shared_ptr<PendingHash> wanted = each.lock();
    if (wanted != nullptr && !closed) {
      wanted->Run();
    }
  }
}

PromptHasher::PromptHasher() : state_(std::make_unique<State>()) {}

PromptHasher::~PromptHasher() {
  if (in_forked_child()) {
    // The thread to join exists in the parent only; memory is all there is to lose.
    [[maybe_unused]] auto *const left = state_.release();
    return;
  }
  Close();
}

std::shared_ptr<const PendingHash> PromptHasher::Begin(IdText tokens) {
  auto pending = std::make_shared<PendingHash>(std::move(tokens));
  if (in_forked_child() || !state_->Add(pending)) {
    pending->Run();
  }
  return pending;
}

void PromptHasher::Close() {
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->closed = true;
  }
  state_->loop.Stop();
}

}  // namespace datadist
