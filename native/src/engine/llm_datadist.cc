// The public class: enters the engine and remembers the reason of a failure.
#include "llm_datadist/llm_datadist.h"

#include "engine/engine_holder.h"
#include "engine/last_error.h"
#include "llm_datadist/llm_datadist_ext.h"

namespace llm_datadist {

using datadist::Engine;
using datadist::Remember;
using EngineStatus = datadist::Status;

class LlmDataDist::LlmDataDistImpl : public datadist::EngineHolder {
 public:
  LlmDataDistImpl(uint64_t cluster_id, LlmRole role) : EngineHolder(cluster_id, role, datadist::EngineApi::kCpp) {}
};

struct LlmDataDistAccess {
  template <typename Act>
  static Status WithEngine(const char *call, const LlmDataDist &datadist, const Act &act) {
    return Remember(call, datadist.impl_->With(act));
  }
};

namespace {

// The statuses of the clusters into the caller's list; the last failure is that of the call. `unanswered` is what
// programs wait for where a peer, a stopped one say, does not answer in time: LLM_TIMEOUT they take for a transfer's.
EngineStatus Deliver(const datadist::Result<std::vector<EngineStatus>> &results, Status unanswered,
                     std::vector<Status> &rets) {
  if (!results.ok()) {
    return results.status();
  }
  EngineStatus overall;
  rets.clear();
  for (const EngineStatus &status : results.value()) {
    rets.push_back(status.code() == LLM_TIMEOUT ? unanswered : status.code());
    if (!status.ok()) {
      overall = EngineStatus(rets.back(), status.text());
    }
  }
  return overall;
}

}  // namespace

LlmDataDist::LlmDataDist(uint64_t cluster_id, LlmRole role)
    : impl_(std::make_unique<LlmDataDistImpl>(cluster_id, role)) {}

LlmDataDist::~LlmDataDist() = default;

Status LlmDataDist::Initialize(const std::map<AscendString, AscendString> &options) {
  return Remember("Initialize", impl_->Start(options));
}

void LlmDataDist::Finalize() { Remember("Finalize", impl_->Stop()); }

Status LlmDataDist::SetRole(LlmRole role, const std::map<AscendString, AscendString> &options) {
  return LlmDataDistAccess::WithEngine("SetRole", *this,
                                       [&](Engine &engine) { return engine.SetRole(role, options); });
}

Status LlmDataDist::LinkLlmClusters(const std::vector<ClusterInfo> &clusters, std::vector<Status> &rets,
                                    int32_t timeout_in_millis) {
  return LlmDataDistAccess::WithEngine("LinkLlmClusters", *this, [&](Engine &engine) {
    return Deliver(engine.LinkClusters(clusters, timeout_in_millis), LLM_LINK_FAILED, rets);
  });
}

Status LlmDataDist::UnlinkLlmClusters(const std::vector<ClusterInfo> &clusters, std::vector<Status> &rets,
                                      int32_t timeout_in_millis, bool force_flag) {
  return LlmDataDistAccess::WithEngine("UnlinkLlmClusters", *this, [&](Engine &engine) {
    return Deliver(engine.UnlinkClusters(clusters, timeout_in_millis, force_flag), LLM_UNLINK_FAILED, rets);
  });
}

Status LlmDataDist::AllocateCache(const CacheDesc &cache_desc, Cache &cache) {
  return LlmDataDistAccess::WithEngine("AllocateCache", *this, [&](Engine &engine) {
    const auto made = engine.caches().Allocate(cache_desc, datadist::CacheLayout::kMix, {});
    if (!made.ok()) {
      const bool device_full =
          made.status().code() == LLM_OUT_OF_MEMORY && cache_desc.placement == CachePlacement::kDevice;
      return EngineStatus(device_full ? LLM_DEVICE_OUT_OF_MEMORY : made.status().code(), made.status().text());
    }
    cache.cache_id = made.value().cache_id;
    cache.tensor_addrs.assign(made.value().addrs.begin(), made.value().addrs.end());
    cache.cache_desc = cache_desc;
    return EngineStatus::Ok();
  });
}

Status LlmDataDist::DeallocateCache(int64_t cache_id) {
  return LlmDataDistAccess::WithEngine("DeallocateCache", *this,
                                       [&](Engine &engine) { return engine.caches().Deallocate(cache_id); });
}

Status LlmDataDist::PullKvCache(const CacheIndex &src_cache_index, const Cache &dst_cache, uint32_t batch_index,
                                int64_t size, const KvCacheExtParam &ext_param) {
  return LlmDataDistAccess::WithEngine("PullKvCache", *this, [&](Engine &engine) {
    return engine.PullKvCache(src_cache_index, dst_cache.cache_id, batch_index, size, ext_param);
  });
}

Status LlmDataDist::PullKvBlocks(const CacheIndex &src_cache_index, const Cache &dst_cache,
                                 const std::vector<uint64_t> &src_blocks, const std::vector<uint64_t> &dst_blocks,
                                 const KvCacheExtParam &ext_param) {
  return LlmDataDistAccess::WithEngine("PullKvBlocks", *this, [&](Engine &engine) {
    return engine.PullKvBlocks(src_cache_index, dst_cache.cache_id, src_blocks, dst_blocks, ext_param);
  });
}

Status LlmDataDist::CopyKvCache(const Cache &src_cache, const Cache &dst_cache, uint32_t src_batch_index,
                                uint32_t dst_batch_index, uint64_t offset, int64_t size) {
  return LlmDataDistAccess::WithEngine("CopyKvCache", *this, [&](Engine &engine) {
    return engine.CopyRow({dst_cache.cache_id, src_cache.cache_id, dst_batch_index, src_batch_index, offset, size});
  });
}

Status LlmDataDist::CopyKvBlocks(const Cache &src_cache, const Cache &dst_cache,
                                 const std::vector<uint64_t> &src_blocks,
                                 const std::vector<std::vector<uint64_t>> &dst_blocks_list) {
  return LlmDataDistAccess::WithEngine("CopyKvBlocks", *this, [&](Engine &engine) {
    return engine.CopyKvBlocks(src_cache, dst_cache, src_blocks, dst_blocks_list);
  });
}

Status LlmDataDist::PushKvCache(const Cache &src_cache, const CacheIndex &dst_cache_index, uint32_t src_batch_index,
                                int64_t size, const KvCacheExtParam &ext_param) {
  return LlmDataDistAccess::WithEngine("PushKvCache", *this, [&](Engine &engine) {
    return engine.PushKvCache(src_cache, dst_cache_index, src_batch_index, size, ext_param);
  });
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
    const datadist::Result<int64_t> id = engine.RegisterCache(cache_desc, addrs, {}, {});
    if (!id.ok()) {
      return id.status();
    }
    cache_id = id.value();
    return EngineStatus::Ok();
  });
}

Status LlmDataDist::UnregisterKvCache(int64_t cache_id) {
  return LlmDataDistAccess::WithEngine("UnregisterKvCache", *this, [&](Engine &engine) {
    engine.UnregisterCache(cache_id);
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

Status RegisterKvCache(const LlmDataDist &datadist, const CacheDesc &cache_desc, const std::vector<uint64_t> &addrs,
                       const CacheRights &rights, int64_t &cache_id) {
  return LlmDataDistAccess::WithEngine("RegisterKvCache", datadist, [&](Engine &engine) {
    datadist::Registration registration;
    registration.rights = rights;
    const datadist::Result<int64_t> id = engine.RegisterCache(cache_desc, addrs, registration, {});
    if (!id.ok()) {
      return id.status();
    }
    cache_id = id.value();
    return EngineStatus::Ok();
  });
}

Status GrantWrites(const LlmDataDist &datadist, uint64_t cluster_id, const std::vector<WritableBlocks> &blocks,
                   uint64_t &grant_id) {
  return LlmDataDistAccess::WithEngine("GrantWrites", datadist, [&](Engine &engine) {
    const datadist::Result<uint64_t> id = engine.GrantWrites(cluster_id, blocks);
    if (!id.ok()) {
      return id.status();
    }
    grant_id = id.value();
    return EngineStatus::Ok();
  });
}

Status RevokeWrites(const LlmDataDist &datadist, uint64_t grant_id) {
  bool busy = false;  // an answer, which is no failure to be logged
  const Status status = LlmDataDistAccess::WithEngine("RevokeWrites", datadist, [&](Engine &engine) {
    const EngineStatus revoked = engine.RevokeWrites(grant_id);
    busy = revoked.code() == LLM_LINK_BUSY;
    return busy ? EngineStatus::Ok() : revoked;
  });
  return busy ? LLM_LINK_BUSY : status;
}

Status WaitForHugePages(const LlmDataDist &datadist, HugePagesReport &report) {
  return LlmDataDistAccess::WithEngine("WaitForHugePages", datadist, [&](Engine &engine) {
    report = engine.WaitForHugePages();
    return EngineStatus::Ok();
  });
}

}  // namespace llm_datadist
