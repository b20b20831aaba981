// A Provider with memory of its own, as Node is an LlmDataDist with it.
#ifndef DATADIST_TESTS_SUPPORT_PROVIDER_NODE_H_
#define DATADIST_TESTS_SUPPORT_PROVIDER_NODE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "provider/provider.h"
#include "support/node.h"

namespace datadist::testing {

class ProviderNode {
 public:
  // Ends the test's process where there is no such provider.
  ProviderNode(const std::string &provider, uint64_t cluster_id);

  uint64_t id() const { return id_; }
  Provider &provider() { return *provider_; }
  const std::shared_ptr<Provider> &shared() const { return provider_; }
  uint16_t port() { return provider_->ListenPort().value(); }

  // Fills the memory with the pattern of `seed` and registers it; 0 on failure.
  int64_t AddCache(const Shape &shape, uint32_t seed);
  // The tensors of a cache, one after the other.
  Bytes Contents(int64_t cache_id);

  Status Link(ProviderNode &server, int32_t timeout_ms = kPatienceMs);
  Status Unlink(ProviderNode &server, bool force, int32_t timeout_ms = kPatienceMs);
  BlocksTransfer Blocks(uint64_t cluster, int64_t remote, int64_t local, const testing::Blocks &src,
                        const testing::Blocks &dst) const;
  Status Pull(uint64_t cluster, int64_t src_cache, int64_t dst_cache, const testing::Blocks &src,
              const testing::Blocks &dst) {
    return provider_->PullKvBlocks(Blocks(cluster, src_cache, dst_cache, src, dst));
  }
  Status Push(int64_t src_cache, uint64_t cluster, int64_t dst_cache, const testing::Blocks &src,
              const testing::Blocks &dst) {
    return provider_->PushKvBlocks(Blocks(cluster, dst_cache, src_cache, src, dst));
  }

 private:
  const uint64_t id_;
  // Before the provider, so that it is destroyed after it: no transfer may touch freed memory.
  std::map<int64_t, std::vector<Bytes>> caches_;
  std::shared_ptr<Provider> provider_;
};

}  // namespace datadist::testing

#endif  // DATADIST_TESTS_SUPPORT_PROVIDER_NODE_H_
