// The owner's end of a link in transport tests: memory with canaries around it, and everything through which an
// initiator reaches it. Runs in the test's process or, behind the same interface, in a second one.
#ifndef DATADIST_TESTS_TRANSPORT_SUPPORT_OWNER_H_
#define DATADIST_TESTS_TRANSPORT_SUPPORT_OWNER_H_

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "base/fd.h"
#include "base/peer_process.h"
#include "control/messages.h"
#include "memory/region_table.h"
#include "transport/cma/addresses.h"
#include "transport/cma/cma_data_path.h"
#include "transport/tcp/tcp_service.h"
#include "transport/transport.h"

namespace datadist::test {

struct CacheShape {
  uint32_t num_tensors = 1;
  uint64_t num_blocks = 1;
  uint64_t stride = 1;
  uint64_t distance = 0;  // between the starts of tensors that overlap; 0: each has memory of its own
};

// What a cache filled with `seed` holds, tensor after tensor.
std::vector<uint8_t> PatternOf(const CacheShape &shape, uint64_t seed);

llm_datadist::CacheDesc DescOf(const CacheShape &shape);

// Tensors in allocations of their own, or overlapping in one; each allocation between two canaries.
class Arena {
 public:
  explicit Arena(const CacheShape &shape);
  void Fill(const std::vector<uint8_t> &bytes);
  std::vector<uint8_t> Bytes() const;
  std::vector<uint64_t> Addrs() const;
  bool CanariesIntact() const;

 private:
  uint8_t *Allocate(size_t bytes);

  size_t tensor_bytes_;
  size_t allocation_bytes_;
  std::vector<std::unique_ptr<uint8_t[]>> memory_;
  std::vector<uint8_t *> allocations_;  // into memory_
  std::vector<uint8_t *> tensors_;  // into memory_, aligned as a tensor library aligns them
};

// As a peer is told of it that comes by cma.
inline RemoteCache Told(const RegisteredCache &cache) {
  return {cache.id(), cache.generation(), cache.geometry(), AddressesOf(cache)};
}

class Owner {
 public:
  virtual ~Owner() = default;
  virtual RemoteCache AddCache(const CacheShape &shape, uint64_t seed) = 0;
  // Unregisters and overwrites the memory at once, as its rightful owner may.
  virtual void UnregisterAndReuse(int64_t cache_id) = 0;
  virtual std::vector<uint8_t> Bytes(int64_t cache_id) = 0;
  virtual bool CanariesIntact(int64_t cache_id) = 0;

  // Whose memory it is.
  virtual std::shared_ptr<const PeerProcess> Process() = 0;

  virtual uint16_t Listen() = 0;
  // Accepts connections that wait, and serves each with a TcpServer.
  virtual void Serve(size_t connections, std::chrono::milliseconds max_request) = 0;

  // Does what a push asks for.
  virtual Status Read(const PushRequest &request) = 0;
};

// In this process.
class OwnerHere final : public Owner {
 public:
  RemoteCache AddCache(const CacheShape &shape, uint64_t seed) override;
  void UnregisterAndReuse(int64_t cache_id) override;
  std::vector<uint8_t> Bytes(int64_t cache_id) override;
  bool CanariesIntact(int64_t cache_id) override;
  std::shared_ptr<const PeerProcess> Process() override { return PeerProcess::Self(); }
  uint16_t Listen() override;
  void Serve(size_t connections, std::chrono::milliseconds max_request) override;
  Status Read(const PushRequest &request) override { return ReadFrom(PeerProcess::Self(), request); }
  Status ReadFrom(std::shared_ptr<const PeerProcess> initiator, const PushRequest &request);

  const std::shared_ptr<RegionTable> &regions() const { return regions_; }

 private:
  std::map<int64_t, std::unique_ptr<Arena>> arenas_;  // dies last: the servers below still use it
  std::shared_ptr<RegionTable> regions_ = RegionTable::Create({});
  Fd listener_;
  TcpService streams_{2};
  std::vector<std::unique_ptr<TcpServer>> servers_;
};

// A connected socket to 127.0.0.1:port.
Fd Dial(uint16_t port);

}  // namespace datadist::test

#endif  // DATADIST_TESTS_TRANSPORT_SUPPORT_OWNER_H_
