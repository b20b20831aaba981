// The links of one endpoint, by the id that the peer announced; and which links are being made.
//
// At most `max_links` live ones, those being made included. Two ends that dial each other at once would each
// replace the other's link by its own, and lose both: so an end that is dialling a peer refuses that peer's own dial if
// the peer's id is the larger one, or among equal ids (two-sided mode has them) its incarnation, and does not begin to
// dial a peer that is just linking to it (LLM_PROCESSING_LINK).
// A dial that reaches the peer only after the peer's own has come through ends with LLM_ALREADY_LINK (ClientHandshake).
#ifndef DATADIST_LINK_LINK_TABLE_H_
#define DATADIST_LINK_LINK_TABLE_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "link/link.h"

namespace datadist {

// A comm that is being prepared, as the accepting end of a bilateral link sees it: whom it waits for, and whom to tell
// how the link went.
class CommWaiter {
 public:
  virtual ~CommWaiter() = default;
  // Whether it has no link to the peer yet, and had none.
  virtual bool AwaitsOnLoop(uint64_t peer_id) const = 0;
  virtual void OnPeerLinkedOnLoop(uint64_t peer_id) = 0;
  // We refused the peer. It may come again.
  virtual void OnPeerRefusedOnLoop(uint64_t peer_id, const Status &why) = 0;
};

// Who prepares the comm of that name, if the peer is a member; empty when nobody does.
using CommFinder = std::function<std::shared_ptr<CommWaiter>(const std::string &name, uint64_t peer_id)>;

class LinkTable : public std::enable_shared_from_this<LinkTable> {
 public:
  // Keeps room for one link for as long as anybody holds it.
  struct Reservation {
    uint64_t peer_id = 0;
    std::shared_ptr<void> place;
    bool Holds(uint64_t id) const { return place != nullptr && peer_id == id; }
  };

  LinkTable(uint64_t own_id, const Incarnation &own_incarnation, uint32_t max_links)
      : own_id_(own_id), own_incarnation_(own_incarnation), max_links_(max_links) {}

  // LLM_PROCESSING_LINK, or LLM_PARAM_INVALID when the table is full.
  Result<Reservation> ReserveDial(uint64_t peer_id);
  Result<Reservation> ReserveServe(uint64_t peer_id, const Incarnation &incarnation);

  // Closes the link that the new one replaces. LLM_FAILED after Shut.
  Status Insert(const std::shared_ptr<Link> &link);
  // Inserts a link whose peer is ready, and establishes it.
  Status Adopt(const std::shared_ptr<Link> &link);
  void Remove(const Link *link);

  std::shared_ptr<Link> Find(uint64_t peer_id) const;
  // By the announced id, or else by the id that the caller once linked with, if `address` (empty: any) leaves one.
  std::shared_ptr<Link> FindForUnlink(uint64_t id, const std::string &address) const;
  bool HasLive(uint64_t peer_id) const;
  bool Empty() const;
  std::vector<uint64_t> PeerIds() const;

  // On the loop, or before anything is accepted.
  void SetCommFinder(CommFinder finder) { comm_finder_ = std::move(finder); }
  std::shared_ptr<CommWaiter> FindCommOnLoop(const std::string &name, uint64_t peer_id) const {
    return comm_finder_ ? comm_finder_(name, peer_id) : nullptr;
  }

  // Takes all links out; nothing can be inserted any more.
  std::vector<std::shared_ptr<Link>> Shut();

 private:
  struct Making {
    uint32_t dialling = 0;
    uint32_t serving = 0;
  };
  using Count = uint32_t Making::*;
  Result<Reservation> ReserveLocked(uint64_t peer_id, Count count);
  Status CheckRoomLocked(uint64_t peer_id) const;
  void Release(uint64_t peer_id, Count count);

  const uint64_t own_id_;
  const Incarnation own_incarnation_;
  const uint32_t max_links_;
  CommFinder comm_finder_;  // of the loop
  mutable std::mutex mutex_;
  std::map<uint64_t, std::shared_ptr<Link>> links_;  // guarded by mutex_
  std::map<uint64_t, Making> making_;                // guarded by mutex_
  bool shut_ = false;                                // guarded by mutex_
};

}  // namespace datadist

#endif  // DATADIST_LINK_LINK_TABLE_H_
