#include "engine/engine_holder.h"

#include <utility>

#include "base/process_epoch.h"

namespace datadist {

EngineHolder::~EngineHolder() {
  if (Forked()) {
    // The threads to be joined exist in the parent only, and locks may be held for ever: let it lie.
    [[maybe_unused]] auto *abandoned = new std::shared_ptr<Engine>(std::move(engine_));
  } else {
    StopEngine();
  }
}

Status EngineHolder::Start(const OptionMap &options) {
  return Guarded([&]() -> Status {
    const std::lock_guard<std::mutex> starting(start_mutex_);
    if (Get() != nullptr) {
      return Status::Ok();
    }
    Result<std::shared_ptr<Engine>> engine = Engine::Start(cluster_id_, role_, api_, options);
    if (!engine.ok()) {
      return engine.status();
    }
    owner_epoch_.store(ProcessEpoch());
    const std::lock_guard<std::mutex> lock(mutex_);
    engine_ = std::move(engine).value();
    return Status::Ok();
  });
}

Status EngineHolder::Stop() {
  return Guarded([&]() -> Status {
    StopEngine();
    return Status::Ok();
  });
}

void EngineHolder::StopEngine() {
  std::shared_ptr<Engine> engine;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    engine.swap(engine_);
  }
  if (engine != nullptr) {
    engine->Stop();
    owner_epoch_.store(0);
  }
}

// Before any lock: in a child of fork() one may be held by a thread that does not exist there.
bool EngineHolder::Forked() const {
  const uint64_t owner = owner_epoch_.load();
  return owner != 0 && owner != ProcessEpoch();
}

std::shared_ptr<Engine> EngineHolder::Get() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return engine_;
}

}  // namespace datadist
