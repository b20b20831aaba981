#include "support/provider_node.h"

#include <cstdio>
#include <cstdlib>
#include <utility>

namespace datadist::testing {
namespace {

std::unique_ptr<Provider> Make(const std::string &name, uint64_t cluster_id) {
  auto made = MakeProvider(name, cluster_id, llm_datadist::LlmRole::kMix);
  if (!made.ok()) {
    std::fprintf(stderr, "%s\n", made.status().text().c_str());
    std::abort();
  }
  return std::move(made).value();
}

}  // namespace

ProviderNode::ProviderNode(const std::string &provider, uint64_t cluster_id)
    : id_(cluster_id), provider_(Make(provider, cluster_id)) {}

int64_t ProviderNode::AddCache(const Shape &shape, uint32_t seed) {
  const Bytes contents = PatternContents(shape, seed);
  const auto tensor_bytes = static_cast<std::ptrdiff_t>(shape.blocks * shape.stride);
  std::vector<Bytes> tensors;
  std::vector<uint64_t> addrs;
  for (std::ptrdiff_t tensor = 0; tensor < static_cast<std::ptrdiff_t>(shape.tensors); ++tensor) {
    const auto begin = contents.begin() + tensor * tensor_bytes;
    tensors.emplace_back(begin, begin + tensor_bytes);
    addrs.push_back(reinterpret_cast<uint64_t>(tensors.back().data()));
  }
  llm_datadist::CacheDesc desc{};
  desc.num_tensors = shape.tensors;
  desc.data_type = llm_datadist::DT_INT32;
  desc.shape = {shape.blocks, shape.stride / 4};
  const Result<int64_t> cache_id = provider_->RegisterKvCache(desc, addrs);
  if (!cache_id.ok()) {
    return 0;
  }
  caches_[cache_id.value()] = std::move(tensors);
  return cache_id.value();
}

Bytes ProviderNode::Contents(int64_t cache_id) {
  // As in Node: what ThreadSanitizer sees of the order between the bytes and this thread.
  [[maybe_unused]] const Status status = provider_->UnregisterKvCache(0);
  Bytes contents;
  for (const Bytes &tensor : caches_.at(cache_id)) {
    contents.insert(contents.end(), tensor.begin(), tensor.end());
  }
  return contents;
}

Status ProviderNode::Link(ProviderNode &server, int32_t timeout_ms) {
  std::vector<llm_datadist::Status> rets;
  return provider_->Link({Cluster(server.id(), server.port())}, rets, timeout_ms);
}

Status ProviderNode::Unlink(ProviderNode &server, bool force, int32_t timeout_ms) {
  std::vector<llm_datadist::Status> rets;
  return provider_->Unlink({Cluster(server.id(), server.port())}, rets, timeout_ms, force);
}

BlocksTransfer ProviderNode::Blocks(uint64_t cluster, int64_t remote, int64_t local, const testing::Blocks &src,
                                    const testing::Blocks &dst) const {
  BlocksTransfer transfer;
  transfer.remote = {cluster, remote, 0, {}};
  transfer.local.cache_id = local;
  transfer.src_blocks = src;
  transfer.dst_blocks = dst;
  return transfer;
}

}  // namespace datadist::testing
