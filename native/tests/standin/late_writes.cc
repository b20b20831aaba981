#include "late_writes.h"

#include <cstring>

namespace standin {

void LateWrites::Add(uint64_t cluster_id, std::chrono::milliseconds delay, Ranges ranges) {
  const std::lock_guard<std::mutex> lock(mutex_);
  writers_.emplace(cluster_id, std::thread([delay, ranges = std::move(ranges)] {
                     std::this_thread::sleep_for(delay);
                     for (const auto &[address, bytes] : ranges) {
                       std::memset(reinterpret_cast<void *>(address), kRubbish, bytes);
                     }
                   }));
}

bool LateWrites::Broken(uint64_t cluster_id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return writers_.count(cluster_id) != 0;
}

void LateWrites::Await(uint64_t cluster_id) {
  std::multimap<uint64_t, std::thread> awaited;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto it = writers_.begin(); it != writers_.end();) {
      const bool meant = cluster_id == kAll || it->first == cluster_id;
      it = meant ? (awaited.emplace(it->first, std::move(it->second)), writers_.erase(it)) : std::next(it);
    }
  }
  for (auto &[id, writer] : awaited) {
    writer.join();
  }
}

}  // namespace standin
