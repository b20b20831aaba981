// Which comms of one endpoint are being prepared, and which of their members are still to come: what the accepting end
// of a bilateral link must know, and whom it tells how the link went.
#ifndef DATADIST_LINK_EXPECTED_COMMS_H_
#define DATADIST_LINK_EXPECTED_COMMS_H_

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "base/status.h"

namespace datadist {

class CommWaiter {
 public:
  virtual ~CommWaiter() = default;
  virtual void OnPeerLinkedOnLoop(uint64_t peer_id) = 0;
  // We refused the peer. It may come again.
  virtual void OnPeerRefusedOnLoop(uint64_t peer_id, const Status &why) = 0;
};

class ExpectedComms {
 public:
  void Expect(const std::string &comm_name, std::set<uint64_t> peer_ids, std::weak_ptr<CommWaiter> waiter) {
    const std::lock_guard<std::mutex> lock(mutex_);
    comms_[comm_name] = Entry{peer_ids, std::move(peer_ids), std::move(waiter)};
  }

  void Forget(const std::string &comm_name) {
    const std::lock_guard<std::mutex> lock(mutex_);
    comms_.erase(comm_name);
  }

  // Who prepares that comm, if the peer is a member; empty when nobody does.
  std::shared_ptr<CommWaiter> Find(const std::string &comm_name, uint64_t peer_id) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto it = comms_.find(comm_name);
    return it != comms_.end() && it->second.peer_ids.count(peer_id) != 0 ? it->second.waiter.lock() : nullptr;
  }

  // Whether that comm has no link to the peer yet, and had none.
  bool Awaits(const std::string &comm_name, uint64_t peer_id) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto it = comms_.find(comm_name);
    return it != comms_.end() && it->second.awaited.count(peer_id) != 0;
  }

  void Linked(const std::string &comm_name, uint64_t peer_id) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const auto it = comms_.find(comm_name); it != comms_.end()) {
      it->second.awaited.erase(peer_id);
    }
  }

 private:
  struct Entry {
    std::set<uint64_t> peer_ids;
    std::set<uint64_t> awaited;
    std::weak_ptr<CommWaiter> waiter;
  };
  mutable std::mutex mutex_;
  std::map<std::string, Entry> comms_;  // guarded by mutex_
};

}  // namespace datadist

#endif  // DATADIST_LINK_EXPECTED_COMMS_H_
