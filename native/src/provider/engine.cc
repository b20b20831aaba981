#include "provider/engine.h"

#include <string>
#include <utility>
#include <vector>

#include "engine/engine_holder.h"
#include "memory/region_table.h"
#include "provider/extension.h"

namespace datadist {
namespace {

using llm_datadist::ClusterInfo;

OptionMap ToAscend(const Options &options) {
  OptionMap converted;
  for (const auto &[key, value] : options) {
    converted.emplace(ge::AscendString(key.data(), key.size()), ge::AscendString(value.data(), value.size()));
  }
  return converted;
}

// The codes of the clusters into the caller's list; the last failure is that of the call.
Status Deliver(const Result<std::vector<Status>> &results, std::vector<llm_datadist::Status> &rets) {
  rets.clear();
  if (!results.ok()) {
    return results.status();
  }
  Status overall;
  for (const Status &status : results.value()) {
    rets.push_back(status.code());
    if (!status.ok()) {
      overall = status;
    }
  }
  return overall;
}

Result<std::vector<CommMember>> ToMembers(const std::vector<Extension::Member> &given) {
  std::vector<CommMember> members;
  for (const Extension::Member &one : given) {
    CommMember member{one.cluster_id, one.rank, std::nullopt};
    if (!one.ip.empty()) {
      const Result<SocketAddress> address = SocketAddress::FromIp(one.ip, one.port);
      if (!address.ok()) {
        return Status(address.status().code(), "rank " + std::to_string(one.rank) + ": " + address.status().text());
      }
      member.address = address.value();
    }
    members.push_back(member);
  }
  return members;
}

Status CheckLists(const Move &move) {
  if (const auto *row = std::get_if<RowMove>(&move)) {
    return CheckRowSize(row->size);
  }
  const auto *blocks = std::get_if<BlockMove>(&move);
  return blocks == nullptr ? Status::Ok() : CheckBlockLists(blocks->src_blocks, blocks->dst_blocks);
}

class EngineProvider final : public Provider, public Extension {
 public:
  EngineProvider(uint64_t cluster_id, llm_datadist::LlmRole role, EngineApi api)
      : api_(api), holder_(cluster_id, role, api) {}

  // ---- Provider ----

  Capabilities capabilities() const override {
    Capabilities host;
    host.device_memory = false;
    host.max_addrs_per_cache = kMaxTensorsPerCache;
    return host;
  }
  Status EnterThread() override { return Status::Ok(); }

  Status Initialize(const Options &options) override { return Tell("Initialize", holder_.Start(ToAscend(options))); }
  void Finalize() override { [[maybe_unused]] const Status status = holder_.Stop(); }
  Status SetRole(llm_datadist::LlmRole role, const Options &options) override {
    return Enter("SetRole", [&](Engine &engine) { return engine.SetRole(role, ToAscend(options)); });
  }

  Status Link(const std::vector<ClusterInfo> &clusters, std::vector<llm_datadist::Status> &rets,
              int32_t timeout_ms) override {
    return Enter("LinkLlmClusters", [&](Engine &engine) {
      return Deliver(engine.LinkClusters(clusters, timeout_ms), rets);
    });
  }
  Status Unlink(const std::vector<ClusterInfo> &clusters, std::vector<llm_datadist::Status> &rets, int32_t timeout_ms,
                bool force) override {
    return Enter("UnlinkLlmClusters", [&](Engine &engine) {
      return Deliver(engine.UnlinkClusters(clusters, timeout_ms, force), rets);
    });
  }

  Result<int64_t> RegisterKvCache(const llm_datadist::CacheDesc &desc, const std::vector<uint64_t> &addrs) override {
    return Enter("RegisterKvCache", [&](Engine &engine) { return engine.RegisterCache(desc, addrs, {}, {}); });
  }
  Status UnregisterKvCache(int64_t cache_id) override {
    return Enter("UnregisterKvCache", [&](Engine &engine) {
      engine.UnregisterCache(cache_id);
      return Status::Ok();
    });
  }

  Result<uint64_t> GrantWrites(uint64_t cluster_id, const std::vector<WritableBlocks> &blocks) override {
    return Enter("GrantWrites", [&](Engine &engine) { return engine.GrantWrites(cluster_id, blocks); });
  }
  Status RevokeWrites(uint64_t grant_id) override {
    return Enter("RevokeWrites", [&](Engine &engine) { return engine.RevokeWrites(grant_id); });
  }

  Status PullKvBlocks(const BlocksTransfer &t) override {
    return Enter("PullKvBlocks", [&](Engine &engine) {
      return engine.PullKvBlocks(t.remote, t.local.cache_id, t.src_blocks, t.dst_blocks, t.ext, t.time_left);
    });
  }
  Status PushKvBlocks(const BlocksTransfer &t) override {
    return Enter("PushKvBlocks", [&](Engine &engine) {
      return engine.PushKvBlocks(t.local, t.remote, t.src_blocks, t.dst_blocks, t.ext, t.time_left);
    });
  }
  Status PullKvCache(const CacheTransfer &t) override {
    return Enter("PullKvCache", [&](Engine &engine) {
      return engine.PullKvCache(t.remote, t.local.cache_id, t.local_batch_index, t.size, t.ext);
    });
  }
  Status PushKvCache(const CacheTransfer &t) override {
    return Enter("PushKvCache", [&](Engine &engine) {
      return engine.PushKvCache(t.local, t.remote, t.local_batch_index, t.size, t.ext);
    });
  }

  Result<uint16_t> ListenPort() override {
    return Enter("QueryListenPort", [](Engine &engine) { return engine.ListenPort(); });
  }
  Result<llm_datadist::LinkReport> QueryLink(uint64_t cluster_id) override {
    return Enter("QueryLink", [&](Engine &engine) { return engine.QueryLink(cluster_id); });
  }
  Result<std::vector<uint64_t>> LinkedClusters() override {
    return Enter("LinkedClusters",
                 [](Engine &engine) { return Result<std::vector<uint64_t>>(engine.LinkedClusters()); });
  }
  Result<llm_datadist::HugePagesReport> WaitForHugePages() override {
    return Enter("WaitForHugePages",
                 [](Engine &engine) { return Result<llm_datadist::HugePagesReport>(engine.WaitForHugePages()); });
  }
  Extension *extension() override { return this; }

  // ---- Extension ----

  Result<int64_t> LinkComm(const std::string &name, const std::vector<Member> &given,
                           std::chrono::seconds total_time) override {
    return holder_.With([&](Engine &engine) -> Result<int64_t> {
      const Result<std::vector<CommMember>> members = ToMembers(given);
      if (!members.ok()) {
        return members.status();
      }
      const Result<CommTable *> comms = engine.Comms();
      return comms.ok() ? comms.value()->Link(name, members.value(), total_time) : comms.status();
    });
  }
  Status UnlinkComm(int64_t comm_id) override {
    return holder_.With([&](Engine &engine) {
      const Result<CommTable *> comms = engine.Comms();
      return comms.ok() ? comms.value()->Unlink(comm_id) : comms.status();
    });
  }
  Result<CommReport> QueryComm(int64_t comm_id) override {
    return holder_.With([&](Engine &engine) {
      const Result<CommTable *> comms = engine.Comms();
      return comms.ok() ? comms.value()->Query(comm_id) : comms.status();
    });
  }
  Result<bool> HasLinks() override {
    return holder_.With([](Engine &engine) { return Result<bool>(engine.HasLinks()); });
  }

  Result<int64_t> RegisterCache(const llm_datadist::CacheDesc &desc, const std::vector<uint64_t> &addrs,
                                const Registration &registration, const RowKeys &keys) override {
    return holder_.With([&](Engine &engine) { return engine.RegisterCache(desc, addrs, registration, keys); });
  }
  Result<llm_datadist::Cache> AllocateCache(const llm_datadist::CacheDesc &desc, CacheLayout layout,
                                            const RowKeys &keys) override {
    return holder_.With([&](Engine &engine) -> Result<llm_datadist::Cache> {
      Result<CacheRegistry::Allocation> made = engine.caches().Allocate(desc, layout, keys);
      if (!made.ok()) {
        return made.status();
      }
      llm_datadist::Cache cache{};
      cache.cache_id = made.value().cache_id;
      cache.tensor_addrs = std::move(made.value().addrs);
      cache.cache_desc = desc;
      return cache;
    });
  }
  Status DeallocateCache(int64_t cache_id) override {
    return holder_.With([&](Engine &engine) { return engine.caches().Deallocate(cache_id); });
  }
  Status RemoveCacheKey(const CacheKey &key) override {
    return holder_.With([&](Engine &engine) { return engine.caches().RemoveKey(key); });
  }

  Status Pull(const PullTarget &target, const Move &move) override {
    return holder_.With([&](Engine &engine) {
      const Status status = CheckLists(move);
      return status.ok() ? engine.Pull(target, move) : status;
    });
  }
  Status PushLayer(const PushTarget &target, const CacheRef &dst, const Move &move) override {
    return holder_.With([&](Engine &engine) {
      if (!engine.remote_accessible()) {
        return Status(llm_datadist::LLM_FEATURE_NOT_ENABLED, "a push needs llm.EnableRemoteCacheAccessible");
      }
      const Status status = CheckLists(move);
      return status.ok() ? engine.PushLayer(target, dst, move) : status;
    });
  }
  Status PushLayerToAddresses(const PushTarget &target, const std::vector<uint64_t> &dst_addrs,
                              const Move &move) override {
    return holder_.With([&](Engine &engine) {
      const Status status = CheckLists(move);
      return status.ok() ? engine.PushLayerToAddresses(target, dst_addrs, move) : status;
    });
  }
  Status CopyRow(const RowCopy &copy) override {
    return holder_.With([&](Engine &engine) { return engine.CopyRow(copy); });
  }
  Status CopyBlocks(int64_t cache_id, const BlockMove &move) override {
    return holder_.With([&](Engine &engine) { return engine.CopyBlocks(cache_id, move); });
  }
  Status CopyBlocksBetween(const CopySide &src, const CopySide &dst, uint64_t block_bytes,
                           const BlockMove &move) override {
    return holder_.With([&](Engine &engine) { return engine.CopyBlocksBetween(src, dst, block_bytes, move); });
  }

 private:
  Status Tell(const char *call, Status status) const {
    return status.ok() || api_ == EngineApi::kPython ? status
                                                     : Status(status.code(), std::string(call) + ": " + status.text());
  }
  template <typename T>
  Result<T> Tell(const char *call, Result<T> result) const {
    return result.ok() ? std::move(result) : Result<T>(Tell(call, result.status()));
  }
  // act(engine) -> Status or Result.
  template <typename Act>
  auto Enter(const char *call, const Act &act) -> decltype(act(std::declval<Engine &>())) {
    return Tell(call, holder_.With(act));
  }

  const EngineApi api_;
  EngineHolder holder_;
};

}  // namespace

std::unique_ptr<Provider> MakeEngineProvider(uint64_t cluster_id, llm_datadist::LlmRole role, EngineApi api) {
  return std::make_unique<EngineProvider>(cluster_id, role, api);
}

}  // namespace datadist
