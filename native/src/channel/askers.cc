#include "channel/askers.h"

namespace datadist {

void Askers::Came(uint64_t cluster_id) {
  if (cluster_id == 0) {
    return;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  ++connections_[cluster_id];
  left_.erase(cluster_id);
}

void Askers::Left(uint64_t cluster_id, TimePoint now) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto asker = connections_.find(cluster_id);
  if (asker == connections_.end() || --asker->second > 0) {
    return;
  }
  connections_.erase(asker);
  if (left_.size() < kMaxLeft) {
    left_[cluster_id] = now;
  }
}

std::vector<uint64_t> Askers::TakeLeft(TimePoint now) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<uint64_t> taken;
  for (auto asker = left_.begin(); asker != left_.end();) {
    if (now - asker->second >= grace_) {
      taken.push_back(asker->first);
      asker = left_.erase(asker);
    } else {
      ++asker;
    }
  }
  return taken;
}

}  // namespace datadist
