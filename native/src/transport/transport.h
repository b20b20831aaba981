// How bytes move over one link: the seam between the engine and local/, cma/ and tcp/.
//
//   transfer/ ── TransferOp ──> DataPath (one per link and direction of initiative) ──> bytes
//                                  │ needs of the control connection: PeerCalls
//
// Contract, tested for every transport by tests/transport_contract_test.cc and transport_order_test.cc:
//   - Pull and Push block until every byte moved or the call failed, and no later than their deadline plus the time the
//     kernel needs to give back one system call. After they returned, this process does not touch the local buffers.
//   - A failed transfer may have written part of its destination, never anything outside the runs of the op.
//   - Runs are executed in list order where their destinations overlap (spec 6.5: the last write wins).
//   - Every range is checked on both sides: the initiator against the geometry it was told, the owner of the memory
//     against what it registered. No address that came from a peer is dereferenced in this process.
//   - Close may be called from any thread, makes running calls end soon with LLM_FAILED and later ones fail at once.
//   - Pull and Push of one DataPath are called by one thread at a time (the link serialises them).
//
// Calls block instead of having a submit/poll pair: the public API is synchronous, and whoever wants to wait for many
// transfers at once uses the TransferQueue above it.
#ifndef DATADIST_TRANSPORT_TRANSPORT_H_
#define DATADIST_TRANSPORT_TRANSPORT_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "base/deadline.h"
#include "base/status.h"
#include "memory/region_table.h"

namespace datadist {

enum class TransportKind : uint8_t { kLocal = 1, kCma = 2, kTcp = 3 };
const char *TransportName(TransportKind kind);

// What the owner told of one of its caches. The addresses are the owner's own and mean something in its process only.
struct RemoteCache {
  int64_t cache_id = 0;
  uint64_t generation = 0;
  CacheGeometry geometry;
  uint64_t stamp_addr = 0;            // of its CacheStamp::generation; 0 when the link is not same-host
  std::vector<uint64_t> tensor_addrs;  // empty when the link is not same-host
};

// What an owner tells of a cache of its own.
RemoteCache Described(const RegisteredCache &cache);

// `length` bytes at remote_offset of each remote tensor <-> local_offset of the local tensor paired with it.
struct Run {
  uint64_t remote_offset = 0;
  uint64_t local_offset = 0;
  uint64_t length = 0;
};

// Tensors [remote_first_tensor, +tensor_count) are paired in order with local [local_first_tensor, +tensor_count); each
// pair moves the same runs.
struct TransferOp {
  const RemoteCache *remote = nullptr;
  const CachePin *local = nullptr;
  uint32_t remote_first_tensor = 0;
  uint32_t local_first_tensor = 0;
  uint32_t tensor_count = 0;
  std::vector<Run> runs;
};

// Total bytes of an op, LLM_PARAM_INVALID on overflow.
Result<uint64_t> TotalBytes(const TransferOp &op);

// What a transport needs of its link's control connection.
class PeerCalls {
 public:
  virtual ~PeerCalls() = default;

  // Asks the owner of op.remote to read the op's runs out of our memory, and waits until it has. Statuses as of Push.
  virtual Status AskToRead(const TransferOp &op, Deadline deadline) = 0;
};

class DataPath {
 public:
  virtual ~DataPath() = default;
  virtual TransportKind kind() const = 0;

  // Remote -> local. LLM_KV_CACHE_NOT_EXIST: the owner no longer has that generation of the cache. LLM_TIMEOUT: the
  // deadline passed. LLM_PARAM_INVALID: a range is outside. LLM_FAILED: the path is broken; the link must be remade.
  virtual Status Pull(const TransferOp &op, Deadline deadline) = 0;
  // Local -> remote, same codes.
  virtual Status Push(const TransferOp &op, Deadline deadline) = 0;

  virtual void Close() = 0;
};

}  // namespace datadist

#endif  // DATADIST_TRANSPORT_TRANSPORT_H_
