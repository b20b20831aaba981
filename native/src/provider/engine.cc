#include "provider/engine.h"

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "engine/last_error.h"

namespace datadist {
namespace {

using llm_datadist::LlmDataDist;

// Must run on the thread that made the call, before its next one.
Status WithReason(llm_datadist::Status code) {
  return code == llm_datadist::LLM_SUCCESS ? Status::Ok() : Status(code, LastReason());
}

std::map<ge::AscendString, ge::AscendString> ToAscend(const Options &options) {
  std::map<ge::AscendString, ge::AscendString> converted;
  for (const auto &[key, value] : options) {
    converted.emplace(ge::AscendString(key.data(), key.size()), ge::AscendString(value.data(), value.size()));
  }
  return converted;
}

class EngineProvider final : public Provider {
 public:
  EngineProvider(uint64_t cluster_id, llm_datadist::LlmRole role) : datadist_(cluster_id, role) {}

  Status Initialize(const Options &options) override { return WithReason(datadist_.Initialize(ToAscend(options))); }
  void Finalize() override { datadist_.Finalize(); }
  Status SetRole(llm_datadist::LlmRole role, const Options &options) override {
    return WithReason(datadist_.SetRole(role, ToAscend(options)));
  }

  Status Link(const std::vector<llm_datadist::ClusterInfo> &clusters, std::vector<llm_datadist::Status> &rets,
              int32_t timeout_ms) override {
    return WithReason(datadist_.LinkLlmClusters(clusters, rets, timeout_ms));
  }
  Status Unlink(const std::vector<llm_datadist::ClusterInfo> &clusters, std::vector<llm_datadist::Status> &rets,
                int32_t timeout_ms, bool force) override {
    return WithReason(datadist_.UnlinkLlmClusters(clusters, rets, timeout_ms, force));
  }

  Result<int64_t> RegisterKvCache(const llm_datadist::CacheDesc &desc, const std::vector<uint64_t> &addrs) override {
    int64_t cache_id = 0;
    const Status status = WithReason(datadist_.RegisterKvCache(desc, addrs, llm_datadist::RegisterCfg(), cache_id));
    return status.ok() ? Result<int64_t>(cache_id) : Result<int64_t>(status);
  }
  Status UnregisterKvCache(int64_t cache_id) override { return WithReason(datadist_.UnregisterKvCache(cache_id)); }

  Status PullKvBlocks(const BlocksTransfer &t) override {
    return WithReason(datadist_.PullKvBlocks(t.remote, t.local, t.src_blocks, t.dst_blocks, t.ext));
  }
  Status PushKvBlocks(const BlocksTransfer &t) override {
    return WithReason(datadist_.PushKvBlocks(t.local, t.remote, t.src_blocks, t.dst_blocks, t.ext));
  }
  Status PullKvCache(const CacheTransfer &t) override {
    return WithReason(datadist_.PullKvCache(t.remote, t.local, t.local_batch_index, t.size, t.ext));
  }
  Status PushKvCache(const CacheTransfer &t) override {
    return WithReason(datadist_.PushKvCache(t.local, t.remote, t.local_batch_index, t.size, t.ext));
  }

  Result<uint16_t> ListenPort() override {
    uint16_t port = 0;
    const Status status = WithReason(llm_datadist::QueryListenPort(datadist_, port));
    return status.ok() ? Result<uint16_t>(port) : Result<uint16_t>(status);
  }
  Result<llm_datadist::LinkReport> QueryLink(uint64_t cluster_id) override {
    llm_datadist::LinkReport report;
    const Status status = WithReason(llm_datadist::QueryLink(datadist_, cluster_id, report));
    return status.ok() ? Result<llm_datadist::LinkReport>(std::move(report)) : Result<llm_datadist::LinkReport>(status);
  }
  Result<llm_datadist::HugePagesReport> WaitForHugePages() override {
    llm_datadist::HugePagesReport report;
    const Status status = WithReason(llm_datadist::WaitForHugePages(datadist_, report));
    return status.ok() ? Result<llm_datadist::HugePagesReport>(report) : Result<llm_datadist::HugePagesReport>(status);
  }

 private:
  LlmDataDist datadist_;
};

}  // namespace

std::unique_ptr<Provider> MakeEngineProvider(uint64_t cluster_id, llm_datadist::LlmRole role) {
  return std::make_unique<EngineProvider>(cluster_id, role);
}

}  // namespace datadist
