#include "link/link_table.h"

#include <tuple>
#include <utility>

namespace datadist {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_PARAM_INVALID;
using llm_datadist::LLM_PROCESSING_LINK;

Status LinkTable::CheckRoomLocked(uint64_t peer_id) const {
  const auto live = [this](uint64_t id) {
    const auto it = links_.find(id);
    return it != links_.end() && it->second->alive();
  };
  size_t used = 0;
  for (const auto &[id, link] : links_) {
    used += link->alive() ? 1 : 0;
  }
  for (const auto &[id, making] : making_) {
    used += live(id) ? 0 : 1;
  }
  const bool has_place = live(peer_id) || making_.count(peer_id) != 0;
  if (!has_place && used >= max_links_) {
    return Status(LLM_PARAM_INVALID, "link to cluster " + std::to_string(peer_id) + ": " + std::to_string(used) +
                                         " links exist, at most " + std::to_string(max_links_) + " (" +
                                         llm_datadist::OPTION_MAX_LINKS + ")");
  }
  return Status::Ok();
}

Result<LinkTable::Reservation> LinkTable::ReserveDial(uint64_t peer_id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (making_.count(peer_id) != 0) {
    return Status(LLM_PROCESSING_LINK, "a link to cluster " + std::to_string(peer_id) + " is just being made");
  }
  return ReserveLocked(peer_id, &Making::dialling);
}

Result<LinkTable::Reservation> LinkTable::ReserveServe(uint64_t peer_id, const Incarnation &incarnation) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto it = making_.find(peer_id);
  const bool yields = std::tie(peer_id, incarnation) > std::tie(own_id_, own_incarnation_);
  if (it != making_.end() && it->second.dialling > 0 && yields) {
    return Status(LLM_PROCESSING_LINK, "cluster " + std::to_string(own_id_) + " is itself just linking to cluster " +
                                           std::to_string(peer_id));
  }
  return ReserveLocked(peer_id, &Making::serving);
}

Result<LinkTable::Reservation> LinkTable::ReserveLocked(uint64_t peer_id, Count count) {
  if (Status room = CheckRoomLocked(peer_id); !room.ok()) {
    return room;
  }
  ++(making_[peer_id].*count);
  const auto release = [self = shared_from_this(), peer_id, count](void *) { self->Release(peer_id, count); };
  return Reservation{peer_id, std::shared_ptr<void>(this, release)};
}

void LinkTable::Release(uint64_t peer_id, Count count) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto it = making_.find(peer_id);
  --(it->second.*count);
  if (it->second.dialling == 0 && it->second.serving == 0) {
    making_.erase(it);
  }
}

Status LinkTable::Insert(const std::shared_ptr<Link> &link) {
  std::shared_ptr<Link> replaced;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (shut_) {
      return Status(LLM_FAILED, "finalized while linking");
    }
    replaced = std::exchange(links_[link->peer_id()], link);
  }
  if (replaced != nullptr) {
    replaced->Close("replaced by a new link");
  }
  return Status::Ok();
}

Status LinkTable::Adopt(const std::shared_ptr<Link> &link) {
  Status inserted = Insert(link);
  if (inserted.ok()) {
    link->Establish();
  }
  return inserted;
}

void LinkTable::Remove(const Link *link) {
  std::shared_ptr<Link> dropped;  // destroyed after the lock is gone
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto it = links_.find(link->peer_id());
  if (it != links_.end() && it->second.get() == link) {
    dropped = std::move(it->second);
    links_.erase(it);
  }
}

std::shared_ptr<Link> LinkTable::Find(uint64_t peer_id) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto it = links_.find(peer_id);
  return it == links_.end() ? nullptr : it->second;
}

std::shared_ptr<Link> LinkTable::FindForUnlink(uint64_t id, const std::string &address) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto it = links_.find(id);
  if (it != links_.end()) {
    return it->second;
  }
  std::shared_ptr<Link> found;
  for (const auto &[peer_id, link] : links_) {
    if (link->caller_id() != id || (!address.empty() && link->peer_address() != address)) {
      continue;
    }
    if (found != nullptr) {
      return nullptr;  // several were linked as "whoever answers": none of them is meant for certain
    }
    found = link;
  }
  return found;
}

bool LinkTable::HasLive(uint64_t peer_id) const {
  const std::shared_ptr<Link> link = Find(peer_id);
  return link != nullptr && link->alive();
}

bool LinkTable::Empty() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return links_.empty();
}

std::vector<uint64_t> LinkTable::PeerIds() const {
  std::vector<uint64_t> ids;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto &[id, link] : links_) {
    ids.push_back(id);
  }
  return ids;
}

std::vector<std::shared_ptr<Link>> LinkTable::Shut() {
  std::vector<std::shared_ptr<Link>> taken;
  const std::lock_guard<std::mutex> lock(mutex_);
  shut_ = true;
  for (auto &[peer_id, link] : links_) {
    taken.push_back(std::move(link));
  }
  links_.clear();
  return taken;
}

}  // namespace datadist
