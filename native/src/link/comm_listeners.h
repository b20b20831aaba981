// The listeners of comms, one for each address of ours in a rank table; comms with the same address share it. Where the
// endpoint's own listener, for clients, has that address, that one serves.
#ifndef DATADIST_LINK_COMM_LISTENERS_H_
#define DATADIST_LINK_COMM_LISTENERS_H_

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "control/address.h"
#include "link/acceptor.h"

namespace datadist {

class CommListeners {
 public:
  // Keeps a listener open for as long as it lives, which is shorter than the CommListeners does.
  class Lease {
   public:
    Lease() = default;
    Lease(Lease &&other) noexcept : owner_(std::exchange(other.owner_, nullptr)), key_(std::move(other.key_)) {}
    Lease &operator=(Lease &&other) noexcept;
    ~Lease();

   private:
    friend class CommListeners;
    Lease(CommListeners *owner, std::string key) : owner_(owner), key_(std::move(key)) {}
    CommListeners *owner_ = nullptr;
    std::string key_;
  };

  CommListeners(std::shared_ptr<LocalEndpoint> endpoint, std::shared_ptr<LinkTable> table)
      : endpoint_(std::move(endpoint)), table_(std::move(table)) {}

  // Where the endpoint's own listener is, or that there is none.
  void SetServerAddress(std::optional<SocketAddress> address);

  // LLM_FAILED: the address cannot be bound.
  Result<Lease> Open(const SocketAddress &address);

 private:
  struct Shared {
    std::shared_ptr<Acceptor> acceptor;
    uint32_t leases = 0;
  };
  bool ServerCoversLocked(const SocketAddress &address) const;
  void Close(const std::string &key);

  const std::shared_ptr<LocalEndpoint> endpoint_;
  const std::shared_ptr<LinkTable> table_;
  std::mutex mutex_;  // held while a listener opens or closes, so that nobody finds an address half free
  std::optional<SocketAddress> server_;    // guarded by mutex_
  std::map<std::string, Shared> by_address_;  // guarded by mutex_
};

}  // namespace datadist

#endif  // DATADIST_LINK_COMM_LISTENERS_H_
