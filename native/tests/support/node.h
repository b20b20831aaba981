// An LlmDataDist with memory of its own, as tests use it: in the test's process or, driven by PeerProcess, in another.
#ifndef DATADIST_TESTS_SUPPORT_NODE_H_
#define DATADIST_TESTS_SUPPORT_NODE_H_

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "llm_datadist/llm_datadist_ext.h"

namespace datadist::testing {

using Bytes = std::vector<uint8_t>;
using Blocks = std::vector<uint64_t>;
using TextOptions = std::map<std::string, std::string>;

constexpr char kLoopback[] = "127.0.0.1";
// Of calls that must succeed, however busy the machine is.
constexpr int32_t kPatienceMs = 20'000;

// DeviceId and a listener on a port of the system's choice, then `more` on top.
TextOptions ServerOptions(const TextOptions &more = {});
// DeviceId and patience, no listener.
TextOptions ClientOptions(const TextOptions &more = {});

// What byte `offset` of a tensor holds after registration: the same in every process.
uint8_t PatternByte(uint32_t seed, uint64_t tensor, uint64_t offset);

struct Shape {
  uint32_t tensors = 4;
  int64_t blocks = 16;
  int64_t stride = 4096;  // bytes, a multiple of 4
};

class Node {
 public:
  explicit Node(uint64_t cluster_id, llm_datadist::LlmRole role = llm_datadist::LlmRole::kMix)
      : id_(cluster_id), datadist_(cluster_id, role) {}

  uint64_t id() const { return id_; }
  llm_datadist::LlmDataDist &datadist() { return datadist_; }

  llm_datadist::Status Start(const TextOptions &options);
  uint16_t port() const;

  // Fills the memory with the pattern of `seed` and registers it; 0 on failure.
  int64_t AddCache(const Shape &shape, uint32_t seed);
  // The tensors of a cache, one after the other.
  Bytes Contents(int64_t cache_id);
  llm_datadist::Cache Handle(int64_t cache_id) const;

  llm_datadist::Status Link(uint64_t remote_id, uint16_t port, int32_t timeout_ms = kPatienceMs);
  llm_datadist::Status Unlink(uint64_t remote_id, uint16_t port, int32_t timeout_ms = kPatienceMs, bool force = false);
  llm_datadist::Status Pull(uint64_t cluster, int64_t src_cache, int64_t dst_cache, const Blocks &src,
                            const Blocks &dst, const llm_datadist::KvCacheExtParam &ext = {});
  llm_datadist::Status Push(int64_t src_cache, uint64_t cluster, int64_t dst_cache, const Blocks &src,
                            const Blocks &dst, const llm_datadist::KvCacheExtParam &ext = {});
  llm_datadist::LinkReport Report(uint64_t cluster) const;
  bool Alive(uint64_t cluster) const;

 private:
  struct Memory {
    Shape shape;
    std::vector<Bytes> tensors;
  };
  uint64_t id_;
  // Before the engine, so that it is destroyed after it: no transfer may touch freed memory.
  std::map<int64_t, Memory> caches_;
  llm_datadist::LlmDataDist datadist_;
};

llm_datadist::ClusterInfo Cluster(uint64_t remote_id, uint16_t port);
std::map<llm_datadist::AscendString, llm_datadist::AscendString> ToAscend(const TextOptions &options);

// The slow, obvious way to say what a transfer does: `to` and `from` as Contents() gives them.
void CopyBlocks(const Bytes &from, const Shape &from_shape, Bytes &to, const Shape &to_shape, const Blocks &src,
                const Blocks &dst);
Bytes PatternContents(const Shape &shape, uint32_t seed);

}  // namespace datadist::testing

#endif  // DATADIST_TESTS_SUPPORT_NODE_H_
