// The engine of one API object, from Initialize to Finalize, and the door through which every call enters it.
#ifndef DATADIST_ENGINE_ENGINE_HOLDER_H_
#define DATADIST_ENGINE_ENGINE_HOLDER_H_

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>

#include "base/status.h"
#include "engine/engine.h"

namespace datadist {

class EngineHolder {
 public:
  EngineHolder(uint64_t cluster_id, llm_datadist::LlmRole role, EngineApi api)
      : cluster_id_(cluster_id), role_(role), api_(api) {}
  ~EngineHolder();
  EngineHolder(const EngineHolder &) = delete;
  EngineHolder &operator=(const EngineHolder &) = delete;

  uint64_t cluster_id() const { return cluster_id_; }

  // Idempotent once successful; a failure leaves the holder empty.
  Status Start(const OptionMap &options);
  Status Stop();

  // act(engine) -> Status or Result. LLM_FAILED when there is no engine, or in a child of fork(), whose copy of the
  // engine has no threads and maybe locks that nobody will ever release. Exceptions end here.
  template <typename Act>
  auto With(const Act &act) -> decltype(act(std::declval<Engine &>())) {
    return Guarded([&]() -> decltype(act(std::declval<Engine &>())) {
      const std::shared_ptr<Engine> engine = Get();
      if (engine == nullptr) {
        return Status(llm_datadist::LLM_FAILED, "not initialized");
      }
      return act(*engine);
    });
  }

 private:
  template <typename Act>
  auto Guarded(const Act &act) -> decltype(act()) {
    try {
      if (Forked()) {
        return Status(llm_datadist::LLM_FAILED, "initialized in another process: not usable after fork()");
      }
      return act();
    } catch (const std::bad_alloc &) {
      return Status(llm_datadist::LLM_OUT_OF_MEMORY, "out of memory");
    } catch (const std::exception &error) {
      return Status(llm_datadist::LLM_FAILED, error.what());
    }
  }
  bool Forked() const;
  std::shared_ptr<Engine> Get();
  void StopEngine();

  const uint64_t cluster_id_;
  const llm_datadist::LlmRole role_;
  const EngineApi api_;
  std::atomic<uint64_t> owner_epoch_{0};  // 0: not initialised
  std::mutex start_mutex_;
  std::mutex mutex_;
  std::shared_ptr<Engine> engine_;  // guarded by mutex_
};

}  // namespace datadist

#endif  // DATADIST_ENGINE_ENGINE_HOLDER_H_
