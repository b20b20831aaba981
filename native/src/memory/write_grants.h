// What peers may write, where they write only what they were granted.
//
//   Add(cluster, areas) ──> id ── Take(cluster, bytes) ──> Use, for as long as the bytes may be written ── Revoke(id)
//
// A grant is of memory, not of a cache: the same tensors may be registered several times, in blocks of other sizes, and
// a write may name another of these registrations than the grant did. What one grant has side by side is one piece.
//
// From the moment that Revoke is called nobody takes a use of that grant any more; it is forgotten once none is left.
//
// Threads: every member may be called from any thread, none waits for a peer. Uses end before it does.
#ifndef DATADIST_MEMORY_WRITE_GRANTS_H_
#define DATADIST_MEMORY_WRITE_GRANTS_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "base/status.h"
#include "memory/ranges.h"
#include "memory/spans.h"

namespace datadist {

class WriteGrants {
 public:
  static constexpr size_t kMaxGrants = 65536;
  // Ranges and tensors of all grants together: 64 MiB.
  static constexpr size_t kMaxParts = 1U << 22;

  // Ranges of each of the tensors at these addresses.
  struct Area {
    std::vector<uint64_t> tensors;
    std::vector<Range> ranges;
  };

  struct Grant;
  struct Ender {
    WriteGrants *grants = nullptr;
    void operator()(Grant *grant) const { grants->End(*grant); }
  };
  // Of somebody who writes.
  using Use = std::unique_ptr<Grant, Ender>;

  WriteGrants();
  ~WriteGrants();
  WriteGrants(const WriteGrants &) = delete;
  WriteGrants &operator=(const WriteGrants &) = delete;

  // Its id, which counts from 1. LLM_PARAM_INVALID where there would be too many.
  Result<uint64_t> Add(uint64_t cluster_id, std::vector<Area> areas);

  // LLM_LINK_BUSY while a use is left: ask again. An unknown id is none.
  Status Revoke(uint64_t id);

  // Of a grant to that cluster that has all of `spans` in each tensor at `tensors`; LLM_PARAM_INVALID where there is
  // none.
  Result<Use> Take(uint64_t cluster_id, const std::vector<uint64_t> &tensors, const SpanList &spans);

 private:
  Use TakeNextLocked(uint64_t cluster_id, uint64_t after, uint64_t tensor, const Span &span);
  void End(Grant &grant);

  std::mutex mutex_;
  uint64_t last_id_ = 0;                                       // guarded by mutex_
  size_t parts_ = 0;                                           // guarded by mutex_
  std::map<uint64_t, std::unique_ptr<Grant>> grants_;          // by id; guarded by mutex_
  std::map<uint64_t, std::map<uint64_t, Grant *>> of_cluster_;  // those that may be taken; guarded by mutex_
};

}  // namespace datadist

#endif  // DATADIST_MEMORY_WRITE_GRANTS_H_
