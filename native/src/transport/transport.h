// How bytes move over one link: the seam between the engine and local/, cma/ and tcp/.
//
//   transfer/ ── TransferOp ──> DataPath ──> bytes <── OwnerPath        (the initiator's end, and the owner's)
//                                  │ needs of the control connection: PeerCalls
//
// A Transport makes both for every link of an endpoint. It is chosen by name (registry.h), and what it must say to the
// transport of that name at the other end goes as blobs, which only the two of them read: with HELLO and WELCOME one of
// the endpoint, with CACHE_INFO and PUSH one of the cache. A further transport is a folder here and a line in
// registry.cc.
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
#include "base/fd.h"
#include "base/peer_process.h"
#include "base/status.h"
#include "memory/region_table.h"
#include "memory/remote_cache.h"

namespace datadist {

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

// What a peer is to do with a cache that it is told of.
enum class Disclosure : uint8_t { kForReading, kForWriting };

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

  // Remote -> local. LLM_KV_CACHE_NOT_EXIST: the owner no longer has that generation of the cache. LLM_TIMEOUT: the
  // deadline passed. LLM_PARAM_INVALID: a range is outside. LLM_FAILED: the path is broken; the link must be remade.
  virtual Status Pull(const TransferOp &op, Deadline deadline) = 0;
  // Local -> remote, same codes.
  virtual Status Push(const TransferOp &op, Deadline deadline) = 0;

  virtual void Close() = 0;
};

// The owner's end of what the peer initiates; as it is, of a transport that needs none.
class OwnerPath {
 public:
  virtual ~OwnerPath() = default;

  // What reads the bytes that the peer asks us to read (PeerCalls); null where its pushes need no asking.
  virtual DataPath *reading() { return nullptr; }
  // From any thread. Whatever runs ends soon.
  virtual void Close() {}
  // Returns when nothing of the peer's touches our memory any more; for what `reading` does, its callers answer. Once
  // closed.
  virtual void Join() {}
};

// The peer as a transport sees it.
struct TransportPeer {
  Blob offer;                                  // of its transport of the same name: data of the peer's, unchecked
  std::shared_ptr<const PeerProcess> process;  // what the kernel says of it; null of one over TCP
  uint64_t cluster_id = 0;
};

// One per endpoint. Start and Stop before and after all others, which may be called from any thread, and do not block.
class Transport {
 public:
  virtual ~Transport() = default;

  // Not where another transport is forced: then only peers may choose this one.
  virtual void Start() {}
  // Ends its threads. Idempotent.
  virtual void Stop() {}

  // What the peer's transport should know of this end: at most kMaxOfferBlob bytes.
  virtual Blob Offer() const { return {}; }
  // Whether the transfers that this end initiates can go this way; otherwise LLM_LINK_FAILED and why.
  virtual Status Reaches(const TransportPeer &peer) const = 0;
  // Whether anybody would have expected that it does: only then a link that goes another way says why.
  virtual bool Expected(const TransportPeer &) const { return true; }
  // Whether the peer may choose it for those that it initiates; otherwise LLM_LINK_FAILED.
  virtual Status Admits(const TransportPeer &peer) const = 0;

  // What follows is for a peer that passed.
  //
  // Data connections of each direction, at most kMaxDataConnections: both ends come to the same number.
  virtual uint16_t Connections(const TransportPeer &) const { return 0; }
  // `calls` outlives the path.
  virtual std::unique_ptr<DataPath> MakePath(const TransportPeer &peer, std::vector<Fd> connections,
                                             PeerCalls *calls) const = 0;
  virtual std::unique_ptr<OwnerPath> Serve(const TransportPeer &, std::vector<Fd> /*connections*/) const {
    return std::make_unique<OwnerPath>();
  }
  // What a peer that comes this way is told of a cache of ours. The blob is for who may read it: one that reads without
  // asking us is kept from it by nothing else.
  RemoteCache Describe(const RegisteredCache &cache, Disclosure disclosure) const {
    return {cache.id(), cache.generation(), cache.geometry(),
            disclosure == Disclosure::kForReading ? BlobOf(cache) : Blob()};
  }

 private:
  // At most kMaxCacheBlob bytes.
  virtual Blob BlobOf(const RegisteredCache &) const { return {}; }
};

}  // namespace datadist

#endif  // DATADIST_TRANSPORT_TRANSPORT_H_
