// The public class: finds the engine, keeps exceptions in, remembers the reason of a failure.
#include "llm_datadist/llm_datadist.h"

#include <atomic>
#include <exception>
#include <mutex>
#include <new>
#include <utility>

#include "base/process_epoch.h"
#include "engine/engine.h"
#include "engine/last_error.h"
#include "llm_datadist/llm_datadist_ext.h"

namespace llm_datadist {

using datadist::Engine;
using datadist::Remember;
using EngineStatus = datadist::Status;

class LlmDataDist::LlmDataDistImpl {
 public:
  LlmDataDistImpl(uint64_t cluster_id, LlmRole role) : cluster_id_(cluster_id), role_(role) {}

  ~LlmDataDistImpl() {
    if (Forked()) {
      // The threads to be joined exist in the parent only, and locks may be held for ever: let it lie.
      [[maybe_unused]] auto *abandoned = new std::shared_ptr<Engine>(std::move(engine_));
    } else {
      Stop();
    }
  }

  EngineStatus Start(const datadist::OptionMap &options) {
    const std::lock_guard<std::mutex> starting(start_mutex_);
    if (Find().ok()) {
      return EngineStatus::Ok();
    }
    datadist::Result<std::shared_ptr<Engine>> engine = Engine::Start(cluster_id_, role_, options);
    if (!engine.ok()) {
      return engine.status();
    }
    owner_epoch_.store(datadist::ProcessEpoch());
    const std::lock_guard<std::mutex> lock(mutex_);
    engine_ = std::move(engine).value();
    return EngineStatus::Ok();
  }

  void Stop() {
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
  bool Forked() const {
    const uint64_t owner = owner_epoch_.load();
    return owner != 0 && owner != datadist::ProcessEpoch();
  }

  datadist::Result<std::shared_ptr<Engine>> Find() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (engine_ == nullptr) {
      return EngineStatus(LLM_FAILED, "not initialized");
    }
    return engine_;
  }

 private:
  const uint64_t cluster_id_;
  const LlmRole role_;
  std::atomic<uint64_t> owner_epoch_{0};  // 0: not initialised
  std::mutex start_mutex_;
  std::mutex mutex_;
  std::shared_ptr<Engine> engine_;  // guarded by mutex_
};

struct LlmDataDistAccess {
  template <typename Act>
  static Status Guard(const char *call, const LlmDataDist &datadist, const Act &act) {
    try {
      if (datadist.impl_->Forked()) {
        return Remember(call, EngineStatus(LLM_FAILED, "initialized in another process: not usable after fork()"));
      }
      return Remember(call, act(*datadist.impl_));
    } catch (const std::bad_alloc &) {
      return Remember(call, EngineStatus(LLM_OUT_OF_MEMORY, "out of memory"));
    } catch (const std::exception &error) {
      return Remember(call, EngineStatus(LLM_FAILED, error.what()));
    }
  }

  // act(engine), or LLM_FAILED when there is none.
  template <typename Act>
  static Status WithEngine(const char *call, const LlmDataDist &datadist, const Act &act) {
    return Guard(call, datadist, [&](auto &impl) {
      const auto engine = impl.Find();
      return engine.ok() ? act(*engine.value()) : engine.status();
    });
  }
};

namespace {

EngineStatus NotEnabled(const char *why) { return EngineStatus(LLM_FEATURE_NOT_ENABLED, why); }

constexpr char kCallerOwnsMemory[] = "memory belongs to the caller, see RegisterKvCache";
constexpr char kNoLocalCopies[] = "local copies are the caller's business";
constexpr char kNotYet[] = "not available in this version";

// The statuses of the clusters into the caller's list; the last failure is that of the call.
EngineStatus Deliver(const datadist::Result<std::vector<EngineStatus>> &results, std::vector<Status> &rets) {
  if (!results.ok()) {
    return results.status();
  }
  EngineStatus overall;
  rets.clear();
  for (const EngineStatus &status : results.value()) {
    rets.push_back(status.code());
    if (!status.ok()) {
      overall = status;
    }
  }
  return overall;
}

}  // namespace

LlmDataDist::LlmDataDist(uint64_t cluster_id, LlmRole role)
    : impl_(std::make_unique<LlmDataDistImpl>(cluster_id, role)) {}

LlmDataDist::~LlmDataDist() = default;

Status LlmDataDist::Initialize(const std::map<AscendString, AscendString> &options) {
  return LlmDataDistAccess::Guard("Initialize", *this, [&](auto &impl) { return impl.Start(options); });
}

void LlmDataDist::Finalize() {
  LlmDataDistAccess::Guard("Finalize", *this, [](auto &impl) {
    impl.Stop();
    return EngineStatus::Ok();
  });
}

Status LlmDataDist::SetRole(LlmRole, const std::map<AscendString, AscendString> &) {
  return LlmDataDistAccess::WithEngine("SetRole", *this, [](Engine &) { return NotEnabled(kNotYet); });
}

Status LlmDataDist::LinkLlmClusters(const std::vector<ClusterInfo> &clusters, std::vector<Status> &rets,
                                    int32_t timeout_in_millis) {
  return LlmDataDistAccess::WithEngine("LinkLlmClusters", *this, [&](Engine &engine) {
    return Deliver(engine.LinkClusters(clusters, timeout_in_millis), rets);
  });
}

Status LlmDataDist::UnlinkLlmClusters(const std::vector<ClusterInfo> &clusters, std::vector<Status> &rets,
                                      int32_t timeout_in_millis, bool force_flag) {
  return LlmDataDistAccess::WithEngine("UnlinkLlmClusters", *this, [&](Engine &engine) {
    return Deliver(engine.UnlinkClusters(clusters, timeout_in_millis, force_flag), rets);
  });
}

Status LlmDataDist::AllocateCache(const CacheDesc &, Cache &) {
  return Remember("AllocateCache", NotEnabled(kCallerOwnsMemory));
}

Status LlmDataDist::DeallocateCache(int64_t) { return Remember("DeallocateCache", NotEnabled(kCallerOwnsMemory)); }

Status LlmDataDist::PullKvCache(const CacheIndex &, const Cache &, uint32_t, int64_t, const KvCacheExtParam &) {
  return LlmDataDistAccess::WithEngine("PullKvCache", *this, [](Engine &) { return NotEnabled(kNotYet); });
}

Status LlmDataDist::PullKvBlocks(const CacheIndex &src_cache_index, const Cache &dst_cache,
                                 const std::vector<uint64_t> &src_blocks, const std::vector<uint64_t> &dst_blocks,
                                 const KvCacheExtParam &ext_param) {
  return LlmDataDistAccess::WithEngine("PullKvBlocks", *this, [&](Engine &engine) {
    return engine.PullKvBlocks(src_cache_index, dst_cache.cache_id, src_blocks, dst_blocks, ext_param);
  });
}

Status LlmDataDist::CopyKvCache(const Cache &, const Cache &, uint32_t, uint32_t, uint64_t, int64_t) {
  return Remember("CopyKvCache", NotEnabled(kNoLocalCopies));
}

Status LlmDataDist::CopyKvBlocks(const Cache &, const Cache &, const std::vector<uint64_t> &,
                                 const std::vector<std::vector<uint64_t>> &) {
  return Remember("CopyKvBlocks", NotEnabled(kNoLocalCopies));
}

Status LlmDataDist::PushKvCache(const Cache &, const CacheIndex &, uint32_t, int64_t, const KvCacheExtParam &) {
  return LlmDataDistAccess::WithEngine("PushKvCache", *this, [](Engine &) { return NotEnabled(kNotYet); });
}

Status LlmDataDist::PushKvBlocks(const Cache &src_cache, const CacheIndex &dst_cache_index,
                                 const std::vector<uint64_t> &src_blocks, const std::vector<uint64_t> &dst_blocks,
                                 const KvCacheExtParam &ext_param) {
  return LlmDataDistAccess::WithEngine("PushKvBlocks", *this, [&](Engine &engine) {
    return engine.PushKvBlocks(src_cache, dst_cache_index, src_blocks, dst_blocks, ext_param);
  });
}

Status LlmDataDist::RegisterKvCache(const CacheDesc &cache_desc, const std::vector<uint64_t> &addrs,
                                    const RegisterCfg &, int64_t &cache_id) {
  return LlmDataDistAccess::WithEngine("RegisterKvCache", *this, [&](Engine &engine) {
    const datadist::Result<int64_t> id = engine.RegisterKvCache(cache_desc, addrs);
    if (!id.ok()) {
      return id.status();
    }
    cache_id = id.value();
    return EngineStatus::Ok();
  });
}

Status LlmDataDist::UnregisterKvCache(int64_t cache_id) {
  return LlmDataDistAccess::WithEngine("UnregisterKvCache", *this, [&](Engine &engine) {
    engine.UnregisterKvCache(cache_id);
    return EngineStatus::Ok();
  });
}

Status QueryListenPort(const LlmDataDist &datadist, uint16_t &port) {
  return LlmDataDistAccess::WithEngine("QueryListenPort", datadist, [&](Engine &engine) {
    const datadist::Result<uint16_t> result = engine.ListenPort();
    if (!result.ok()) {
      return result.status();
    }
    port = result.value();
    return EngineStatus::Ok();
  });
}

Status QueryLink(const LlmDataDist &datadist, uint64_t cluster_id, LinkReport &report) {
  return LlmDataDistAccess::WithEngine("QueryLink", datadist, [&](Engine &engine) {
    const datadist::Result<LinkReport> result = engine.QueryLink(cluster_id);
    if (!result.ok()) {
      return result.status();
    }
    report = result.value();
    return EngineStatus::Ok();
  });
}

}  // namespace llm_datadist
