#include "endpoint.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <list>
#include <numeric>
#include <optional>

#include "control/address.h"
#include "memory/region_table.h"
#include "provider/engine.h"

extern "C" int32_t aclrtSetDevice(int32_t index);
extern "C" int32_t aclrtGetDevice(int32_t *index);

namespace standin {
namespace {

using namespace llm_datadist;  // the codes, which every line here names
using std::chrono::milliseconds;
using std::chrono::steady_clock;

// The engine's ids of this end's caches begin after those of the two that the stand-in registers for itself.
constexpr int64_t kTable = 1;
constexpr int64_t kTheirTable = 2;
constexpr int64_t kOwnCaches = 2;
constexpr char kEngineOption[] = "datadist.";

std::string Names(const Clusters &clusters) {
  std::string names;
  for (const ClusterInfo &cluster : clusters) {
    names += " " + std::to_string(cluster.remote_cluster_id);
  }
  return names;
}

bool HasIpv6(const Clusters &clusters) {
  const auto is_ipv6 = [](const IpInfo &info) { return std::strchr(info.ip.GetString(), ':') != nullptr; };
  return std::any_of(clusters.begin(), clusters.end(), [&](const ClusterInfo &cluster) {
    return std::any_of(cluster.local_ip_infos.begin(), cluster.local_ip_infos.end(), is_ipv6) ||
           std::any_of(cluster.remote_ip_infos.begin(), cluster.remote_ip_infos.end(), is_ipv6);
  });
}

bool LacksLocalPort(const Clusters &clusters) {
  return std::any_of(clusters.begin(), clusters.end(), [](const ClusterInfo &cluster) {
    return cluster.local_ip_infos.size() != 1 || cluster.local_ip_infos.front().port == 0;
  });
}

// A pull's ranges count only if both are given.
void TakeOneSideForNone(KvCacheExtParam &ext) {
  if (ext.src_layer_range.first < 0 || ext.dst_layer_range.first < 0) {
    ext.src_layer_range = ext.dst_layer_range = {-1, -1};
  }
}

// A push without a source range is one of the layers that the caller's number of tensors makes.
template <typename Transfer>
bool HasLayers(const Transfer &transfer) {
  const uint32_t tensors = transfer.local.cache_desc.num_tensors;
  return transfer.ext.src_layer_range.first >= 0 || (tensors > 0 && tensors % transfer.ext.tensor_num_per_layer == 0);
}

}  // namespace

Endpoint::Endpoint(uint64_t cluster_id, LlmRole role)
    : cluster_id_(cluster_id), engine_(datadist::MakeEngineProvider(cluster_id, role, datadist::EngineApi::kCpp)) {}

Endpoint::~Endpoint() {
  late_.Await(LateWrites::kAll);
  engine_->Finalize();
}

template <typename Act>
Code Endpoint::Call(const std::string &call, const Act &act) {
  ++running_;
  int32_t device = 0;
  const Code code = rules_.strict && aclrtGetDevice(&device) != 0 ? LLM_FAILED : act();
  --running_;
  Trace(call, code);
  return code;
}

Code Endpoint::Initialize(const datadist::Options &options) {
  const auto device = options.find(OPTION_DEVICE_ID);
  if (device == options.end() || aclrtSetDevice(std::atoi(device->second.c_str())) != 0) {
    Trace("Initialize", LLM_PARAM_INVALID);
    return LLM_PARAM_INVALID;
  }
  std::string given;
  bool foreign = false;
  for (const auto &[key, value] : options) {
    given += " " + key + "=" + value;
    foreign = foreign || key.rfind(kEngineOption, 0) == 0;
  }
  return Call("Initialize" + given, [&]() -> Code {
    if (rules_.strict && foreign) {
      return LLM_PARAM_INVALID;
    }
    datadist::Options ours = options;
    ours[OPTION_INSECURE] = "1";  // CANN asks nobody who he is
    ours[OPTION_MAX_LINKS] = std::to_string(rules_.max_links);
    StealPort(ours);
    const Code code = engine_->Initialize(ours).code();
    return code == LLM_SUCCESS ? RegisterOwn() : code;
  });
}

// Somebody else takes the port that the caller found free.
void Endpoint::StealPort(const datadist::Options &options) {
  static std::atomic<uint64_t> stolen{0};
  const auto listen = options.find(OPTION_LISTEN_IP_INFO);
  if (listen == options.end() || stolen >= rules_.steal_ports) {
    return;
  }
  ++stolen;
  const auto address = datadist::SocketAddress::Parse(listen->second);
  if (address.ok()) {
    static std::list<datadist::Listeners> thieves;
    auto listeners = datadist::Listen(address.value());
    if (listeners.ok()) {
      thieves.push_back(std::move(listeners).value());
    }
  }
}

Code Endpoint::RegisterOwn() {
  table_ = {};
  table_.max_links = rules_.max_links;
  const llm_datadist::CacheDesc desc{
      CachePlacement::kDevice, 1, DT_INT8, {sizeof(Table) / sizeof(uint64_t), sizeof(uint64_t)}, {}};
  const auto ours = engine_->RegisterKvCache(desc, {reinterpret_cast<uint64_t>(&table_)});
  const auto theirs = engine_->RegisterKvCache(desc, {reinterpret_cast<uint64_t>(&theirs_)});
  return ours.ok() && theirs.ok() ? LLM_SUCCESS : LLM_FAILED;
}

void Endpoint::Finalize() {
  if (rules_.strict && running_ > 0) {
    std::fprintf(stderr, "stand-in of CANN: Finalize beside %d running calls\n", running_.load());
    std::abort();
  }
  late_.Await(LateWrites::kAll);
  engine_->Finalize();
  const std::lock_guard<std::mutex> lock(mutex_);
  caches_.clear();
  links_.clear();
  Trace("Finalize", LLM_SUCCESS);
}

Code Endpoint::SetRole(LlmRole role, const datadist::Options &options) {
  return Call("SetRole", [&] { return engine_->SetRole(role, options).code(); });
}

Code Endpoint::Link(const Clusters &clusters, std::vector<Code> &codes, int32_t timeout_ms) {
  const auto deadline = steady_clock::now() + milliseconds(timeout_ms);
  return Call("LinkLlmClusters" + Names(clusters), [&]() -> Code {
    if (HasIpv6(clusters) || (rules_.local_port && LacksLocalPort(clusters))) {
      return LLM_PARAM_INVALID;
    }
    std::vector<Code> made;
    const datadist::Status status = engine_->Link(clusters, made, timeout_ms);
    Code overall = status.code();
    for (size_t i = 0; i < made.size(); ++i) {
      if (rules_.strict && made[i] == LLM_PROCESSING_LINK) {
        std::this_thread::sleep_until(deadline);
        made[i] = LLM_TIMEOUT;
      } else if (status.text().find("links exist") != std::string::npos && made[i] == LLM_PARAM_INVALID) {
        made[i] = LLM_LINK_FAILED;  // no communicator can be made, here or there
      } else if (made[i] == LLM_SUCCESS) {
        made[i] = EnterLink(clusters[i].remote_cluster_id);
      }
      overall = made[i] != LLM_SUCCESS ? made[i] : overall;
      codes.push_back(made[i]);
    }
    return overall;
  });
}

Code Endpoint::Unlink(const Clusters &clusters, std::vector<Code> &codes, int32_t timeout_ms, bool force) {
  const std::string call = "UnlinkLlmClusters" + Names(clusters) + (force ? " force" : "");
  return Call(call, [&]() -> Code {
    for (const ClusterInfo &cluster : clusters) {
      late_.Await(cluster.remote_cluster_id);
    }
    LeaveLinks(clusters, !force);
    std::vector<Code> dropped;
    const Code code = engine_->Unlink(clusters, dropped, timeout_ms, force).code();
    codes.insert(codes.end(), dropped.begin(), dropped.end());
    return code;
  });
}

// The peer's table is read when the link is made, and never again. A link for which the peer has no room is none.
Code Endpoint::EnterLink(uint64_t cluster_id) {
  if (!rules_.strict) {
    return LLM_SUCCESS;
  }
  const std::lock_guard<std::mutex> theirs_lock(theirs_mutex_);
  BlocksTransfer whole;
  whole.remote = {cluster_id, kTable, 0, {}};
  whole.local.cache_id = kTheirTable;
  whole.src_blocks.resize(sizeof(Table) / sizeof(uint64_t));
  std::iota(whole.src_blocks.begin(), whole.src_blocks.end(), 0);
  whole.dst_blocks = whole.src_blocks;
  if (!engine_->PullKvBlocks(whole).ok()) {
    return LLM_LINK_FAILED;
  }
  const uint64_t entry = cluster_id_ + 1;
  uint64_t others = 0;
  size_t row = Table::kVisitors;
  for (size_t i = 0; i < Table::kVisitors; ++i) {
    const size_t at = (cluster_id_ + i) % Table::kVisitors;  // those that come at once do not meet
    const uint64_t visitor = theirs_.visitors[at];
    others += visitor != 0 && visitor != entry ? 1 : 0;
    row = visitor == entry || (visitor == 0 && row == Table::kVisitors) ? at : row;
  }
  if (others >= theirs_.max_links || row == Table::kVisitors || !WriteEntry(cluster_id, row, entry)) {
    std::vector<Code> dropped;
    const ClusterInfo cluster{cluster_id, 0, {}, {}, {}};
    [[maybe_unused]] const datadist::Status status = engine_->Unlink({cluster}, dropped, 1000, true);
    return LLM_LINK_FAILED;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  links_[cluster_id] = {static_cast<int64_t>(table_.last_cache), static_cast<int64_t>(theirs_.last_cache), row};
  return LLM_SUCCESS;
}

// With theirs_mutex_ held.
bool Endpoint::WriteEntry(uint64_t cluster_id, size_t row, uint64_t entry) {
  theirs_.visitors[row] = entry;
  BlocksTransfer one;
  one.remote = {cluster_id, kTable, 0, {}};
  one.local.cache_id = kTheirTable;
  one.src_blocks = one.dst_blocks = {offsetof(Table, visitors) / sizeof(uint64_t) + row};
  return engine_->PushKvBlocks(one).ok();
}

// Here, and over there if they are to be told.
void Endpoint::LeaveLinks(const Clusters &clusters, bool tell) {
  const std::lock_guard<std::mutex> theirs_lock(theirs_mutex_);
  for (const ClusterInfo &cluster : clusters) {
    const uint64_t id = cluster.remote_cluster_id;
    std::optional<MadeLink> made;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      std::replace(std::begin(table_.visitors), std::end(table_.visitors), id + 1, uint64_t{0});
      if (const auto found = links_.find(id); found != links_.end()) {
        made = found->second;
        links_.erase(found);
      }
    }
    if (made && tell) {
      WriteEntry(id, made->row, 0);
    }
  }
}

Code Endpoint::CheckKnown(uint64_t cluster_id, int64_t local_id, int64_t remote_id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto link = links_.find(cluster_id);
  if (!rules_.strict || link == links_.end()) {
    return LLM_SUCCESS;
  }
  if (remote_id > link->second.last_there) {
    return LLM_KV_CACHE_NOT_EXIST;
  }
  return caches_.count(local_id) != 0 && local_id > link->second.last_here ? LLM_FAILED : LLM_SUCCESS;
}

Code Endpoint::Register(const CacheDesc &desc, const std::vector<uint64_t> &addrs, int64_t &cache_id) {
  return Call("RegisterKvCache " + std::to_string(addrs.size()), [&]() -> Code {
    const auto geometry = datadist::ComputeGeometry(desc);
    Cache cache{addrs, 0, 0};
    if (geometry.ok()) {
      cache.tensor_bytes = geometry.value().tensor_bytes;
      cache.stride = geometry.value().stride;
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const Code full = CheckRegions(cache); full != LLM_SUCCESS) {
      return full;
    }
    const auto registered = engine_->RegisterKvCache(desc, addrs);
    if (!registered.ok()) {
      return registered.status().code();
    }
    cache_id = registered.value() - kOwnCaches;
    table_.last_cache = static_cast<uint64_t>(cache_id);
    caches_.emplace(cache_id, std::move(cache));
    return LLM_SUCCESS;
  });
}

// With mutex_ held.
Code Endpoint::CheckRegions(const Cache &cache) {
  std::map<std::pair<uint64_t, uint64_t>, int> regions;
  const auto add = [&regions](const Cache &one) {
    for (const uint64_t address : one.addrs) {
      ++regions[{address, one.tensor_bytes}];
    }
  };
  add(cache);
  for (const auto &[id, registered] : caches_) {
    add(registered);
  }
  return regions.size() > rules_.max_regions ? LLM_FAILED : LLM_SUCCESS;
}

Code Endpoint::Unregister(int64_t cache_id) {
  return Call("UnregisterKvCache " + std::to_string(cache_id), [&]() -> Code {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (caches_.erase(cache_id) != 0) {
      late_.Await(LateWrites::kAll);  // else it would be the test's own memory that is written to after it was freed
    }
    return cache_id <= 0 ? Code{LLM_SUCCESS} : engine_->UnregisterKvCache(cache_id + kOwnCaches).code();
  });
}

template <typename Transfer, typename Act>
Code Endpoint::Transferred(const char *call, Transfer &transfer, const Act &act) {
  const uint64_t cluster_id = transfer.remote.cluster_id;
  const int64_t local_id = transfer.local.cache_id;
  const int64_t remote_id = transfer.remote.cache_id;
  transfer.local.cache_id += local_id > 0 ? kOwnCaches : 0;
  transfer.remote.cache_id += remote_id > 0 ? kOwnCaches : 0;
  return Call(std::string(call) + " " + std::to_string(cluster_id), [&]() -> Code {
    if (late_.Broken(cluster_id)) {
      return LLM_TIMEOUT;
    }
    const Code known = CheckKnown(cluster_id, local_id, remote_id);
    return known == LLM_SUCCESS ? act() : known;
  });
}

// Whether this pull is one that comes too late; if so, it is on its way.
bool Endpoint::IsLate(const BlocksTransfer &transfer) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto cache = caches_.find(transfer.local.cache_id - kOwnCaches);
  if (rules_.late_every == 0 || cache == caches_.end() || ++pulls_ % rules_.late_every != 0) {
    return false;
  }
  const auto &[first, last] = transfer.ext.dst_layer_range;
  const size_t per_layer = transfer.ext.tensor_num_per_layer;
  const size_t begin = first < 0 ? 0 : static_cast<size_t>(first) * per_layer;
  const size_t end = first < 0 ? cache->second.addrs.size() : static_cast<size_t>(last + 1) * per_layer;
  LateWrites::Ranges ranges;
  for (size_t tensor = begin; tensor < std::min(end, cache->second.addrs.size()); ++tensor) {
    for (const uint64_t block : transfer.dst_blocks) {
      ranges.emplace_back(cache->second.addrs[tensor] + block * cache->second.stride, cache->second.stride);
    }
  }
  late_.Add(transfer.remote.cluster_id, rules_.late, std::move(ranges));
  return true;
}

Code Endpoint::PullBlocks(BlocksTransfer transfer) {
  TakeOneSideForNone(transfer.ext);
  return Transferred("PullKvBlocks", transfer, [&]() -> Code {
    if (rules_.hang) {
      Trace("PullKvBlocks hangs", LLM_SUCCESS);
    }
    while (rules_.hang) {
      std::this_thread::sleep_for(std::chrono::hours(1));
    }
    return IsLate(transfer) ? Code{LLM_TIMEOUT} : engine_->PullKvBlocks(transfer).code();
  });
}

Code Endpoint::PushBlocks(BlocksTransfer transfer) {
  return Transferred("PushKvBlocks", transfer, [&]() -> Code {
    return HasLayers(transfer) ? engine_->PushKvBlocks(transfer).code() : Code{LLM_PARAM_INVALID};
  });
}

Code Endpoint::PullCache(CacheTransfer transfer) {
  TakeOneSideForNone(transfer.ext);
  return Transferred("PullKvCache", transfer, [&] { return engine_->PullKvCache(transfer).code(); });
}

Code Endpoint::PushCache(CacheTransfer transfer) {
  return Transferred("PushKvCache", transfer, [&]() -> Code {
    return HasLayers(transfer) ? engine_->PushKvCache(transfer).code() : Code{LLM_PARAM_INVALID};
  });
}

}  // namespace standin
