#include "support/node.h"

#include <algorithm>

namespace datadist::testing {

using llm_datadist::LLM_SUCCESS;
using llm_datadist::Status;

TextOptions ServerOptions(const TextOptions &more) {
  TextOptions options = more;
  options.emplace(llm_datadist::OPTION_LISTEN_IP_INFO, std::string(kLoopback) + ":0");
  return ClientOptions(options);
}

TextOptions ClientOptions(const TextOptions &more) {
  TextOptions options = more;
  options.emplace(llm_datadist::OPTION_DEVICE_ID, "0");
  options.emplace(llm_datadist::OPTION_SYNC_CACHE_WAIT_TIME, std::to_string(kPatienceMs));
  return options;
}

std::map<llm_datadist::AscendString, llm_datadist::AscendString> ToAscend(const TextOptions &options) {
  std::map<llm_datadist::AscendString, llm_datadist::AscendString> map;
  for (const auto &[key, value] : options) {
    map.emplace(key.c_str(), llm_datadist::AscendString(value.data(), value.size()));
  }
  return map;
}

uint8_t PatternByte(uint32_t seed, uint64_t tensor, uint64_t offset) {
  const uint64_t place = ((offset + 1) * 0x9E3779B97F4A7C15ULL) ^ ((tensor + 1) * 0xC2B2AE3D27D4EB4FULL);
  const uint64_t mixed = place ^ (seed * 0x165667B1ULL);
  return static_cast<uint8_t>((mixed >> 29) ^ (mixed >> 7));
}

Bytes PatternContents(const Shape &shape, uint32_t seed) {
  const auto tensor_bytes = static_cast<uint64_t>(shape.blocks * shape.stride);
  Bytes contents;
  contents.reserve(shape.tensors * tensor_bytes);
  for (uint64_t tensor = 0; tensor < shape.tensors; ++tensor) {
    for (uint64_t offset = 0; offset < tensor_bytes; ++offset) {
      contents.push_back(PatternByte(seed, tensor, offset));
    }
  }
  return contents;
}

void CopyBlocks(const Bytes &from, const Shape &from_shape, Bytes &to, const Shape &to_shape, const Blocks &src,
                const Blocks &dst) {
  const auto stride = static_cast<size_t>(from_shape.stride);
  for (size_t tensor = 0; tensor < from_shape.tensors; ++tensor) {
    for (size_t i = 0; i < src.size(); ++i) {
      const size_t from_at = (tensor * static_cast<size_t>(from_shape.blocks) + src[i]) * stride;
      const size_t to_at = (tensor * static_cast<size_t>(to_shape.blocks) + dst[i]) * stride;
      for (size_t byte = 0; byte < stride; ++byte) {
        to[to_at + byte] = from[from_at + byte];
      }
    }
  }
}

Status Node::Start(const TextOptions &options) { return datadist_.Initialize(ToAscend(options)); }

uint16_t Node::port() const {
  uint16_t port = 0;
  return llm_datadist::QueryListenPort(datadist_, port) == LLM_SUCCESS ? port : 0;
}

int64_t Node::AddCache(const Shape &shape, uint32_t seed) {
  Memory memory;
  memory.shape = shape;
  const Bytes contents = PatternContents(shape, seed);
  const auto tensor_bytes = static_cast<std::ptrdiff_t>(shape.blocks * shape.stride);
  std::vector<uint64_t> addrs;
  for (std::ptrdiff_t tensor = 0; tensor < static_cast<std::ptrdiff_t>(shape.tensors); ++tensor) {
    const auto begin = contents.begin() + tensor * tensor_bytes;
    memory.tensors.emplace_back(begin, begin + tensor_bytes);
    addrs.push_back(reinterpret_cast<uint64_t>(memory.tensors.back().data()));
  }
  llm_datadist::CacheDesc desc{};
  desc.num_tensors = shape.tensors;
  desc.data_type = llm_datadist::DT_INT32;
  desc.shape = {shape.blocks, shape.stride / 4};
  int64_t id = 0;
  if (datadist_.RegisterKvCache(desc, addrs, {}, id) != LLM_SUCCESS) {
    return 0;
  }
  caches_[id] = std::move(memory);
  return id;
}

Bytes Node::Contents(int64_t cache_id) {
  // The bytes came on a thread of the engine, and what orders that thread and this one is another process, which
  // ThreadSanitizer cannot see. Both take the lock of the registrations: that it can.
  datadist_.UnregisterKvCache(0);
  Bytes contents;
  for (const Bytes &tensor : caches_.at(cache_id).tensors) {
    contents.insert(contents.end(), tensor.begin(), tensor.end());
  }
  datadist_.UnregisterKvCache(0);
  return contents;
}

llm_datadist::Cache Node::Handle(int64_t cache_id) const {
  llm_datadist::Cache cache{};
  cache.cache_id = cache_id;
  const auto it = caches_.find(cache_id);
  cache.cache_desc.num_tensors = it == caches_.end() ? 4 : it->second.shape.tensors;
  return cache;
}

llm_datadist::ClusterInfo Cluster(uint64_t remote_id, uint16_t port) {
  llm_datadist::ClusterInfo cluster{};
  cluster.remote_cluster_id = remote_id;
  llm_datadist::IpInfo ip{};
  ip.ip = kLoopback;
  cluster.local_ip_infos.push_back(ip);
  ip.port = port;
  cluster.remote_ip_infos.push_back(ip);
  return cluster;
}

Status Node::Link(uint64_t remote_id, uint16_t port, int32_t timeout_ms) {
  std::vector<Status> rets;
  return datadist_.LinkLlmClusters({Cluster(remote_id, port)}, rets, timeout_ms);
}

Status Node::Unlink(uint64_t remote_id, uint16_t port, int32_t timeout_ms, bool force) {
  std::vector<Status> rets;
  return datadist_.UnlinkLlmClusters({Cluster(remote_id, port)}, rets, timeout_ms, force);
}

Status Node::Pull(uint64_t cluster, int64_t src_cache, int64_t dst_cache, const Blocks &src, const Blocks &dst,
                  const llm_datadist::KvCacheExtParam &ext) {
  return datadist_.PullKvBlocks({cluster, src_cache, 0, {}}, Handle(dst_cache), src, dst, ext);
}

Status Node::Push(int64_t src_cache, uint64_t cluster, int64_t dst_cache, const Blocks &src, const Blocks &dst,
                  const llm_datadist::KvCacheExtParam &ext) {
  return datadist_.PushKvBlocks(Handle(src_cache), {cluster, dst_cache, 0, {}}, src, dst, ext);
}

llm_datadist::LinkReport Node::Report(uint64_t cluster) const {
  llm_datadist::LinkReport report;
  llm_datadist::QueryLink(datadist_, cluster, report);
  return report;
}

bool Node::Alive(uint64_t cluster) const { return Report(cluster).alive; }

}  // namespace datadist::testing
