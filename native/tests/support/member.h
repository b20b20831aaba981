// The links, listeners and comms of one endpoint without the engine above them, and memory with canaries around it.
#ifndef DATADIST_TESTS_SUPPORT_MEMBER_H_
#define DATADIST_TESTS_SUPPORT_MEMBER_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "link/acceptor.h"
#include "comm/comm_table.h"
#include "link/endpoint.h"
#include "link/link_table.h"
#include "support/eventually.h"
#include "transport_support/owner.h"

namespace datadist::testing {

using Addresses = std::vector<SocketAddress>;

class Member {
 public:
  static constexpr datadist::test::CacheShape kShape{2, 8, 4096};

  explicit Member(uint64_t cluster_id, const LinkOptions &options = {}, uint32_t max_comms = 512,
                  const RegionLimits &limits = {});
  ~Member();
  Member(const Member &) = delete;
  Member &operator=(const Member &) = delete;

  uint64_t id() const { return endpoint_->cluster_id(); }
  const std::shared_ptr<LocalEndpoint> &endpoint() const { return endpoint_; }
  const std::shared_ptr<LinkTable> &table() const { return table_; }
  CommTable &comms() { return *comms_; }

  // Opens the endpoint's own listener, instead of one that it has, at a port of the system's choice. Without the name within the host everybody comes
  // over TCP, as from another host.
  SocketAddress Listen(bool within_host = true);
  Status Dial(const SocketAddress &address, uint64_t expected_id = 0, const std::string &comm_name = "",
              int64_t comm_id = 0);
  Status Unlink(uint64_t peer_id);
  bool Linked(uint64_t peer_id) const;

  // A cache of kShape filled from `seed`.
  int64_t AddCache(uint64_t seed, const CacheRights &rights = {});
  std::vector<uint8_t> Bytes(int64_t cache_id);
  bool CanariesIntact() const;
  // Blocks [from, +count) of the source onto blocks [to, +count) of the destination.
  Status Pull(uint64_t peer_id, int64_t remote, int64_t local, uint64_t from, uint64_t to, uint64_t count);
  Status Push(uint64_t peer_id, int64_t local, int64_t remote, uint64_t from, uint64_t to, uint64_t count);

  // The state of a comm once it is no longer kPreparing.
  CommTable::Report Settled(int64_t comm_id);

 private:
  void StopListening();
  Status Transfer(TransferDirection direction, uint64_t peer_id, int64_t remote, int64_t local, Run blocks);

  std::map<int64_t, std::unique_ptr<datadist::test::Arena>> arenas_;  // dies last
  const std::shared_ptr<LocalEndpoint> endpoint_;
  const std::shared_ptr<LinkTable> table_;
  std::unique_ptr<CommTable> comms_;
  std::shared_ptr<Acceptor> acceptor_;
};

// Of an endpoint that lets in whoever comes over TCP.
LinkOptions OpenToAll();

// What PatternOf(kShape, to_seed) looks like after blocks [from, +count) of from_seed were copied onto [to, +count).
std::vector<uint8_t> Copied(uint64_t from_seed, uint64_t to_seed, uint64_t from, uint64_t to, uint64_t count);

// An address that nobody listens at, in a part of the loopback network that is this process's own.
SocketAddress FreeAddress();

}  // namespace datadist::testing

#endif  // DATADIST_TESTS_SUPPORT_MEMBER_H_
