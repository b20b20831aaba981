// Who has asked for a geometry, to link with the rank that it is of: the clusters of D's ranks. P has its half of each
// link, which in some engines stays when D is gone; that D's connection has ended, and none has come in its place, tells.
//
// Threads: any.
#ifndef DATADIST_CHANNEL_ASKERS_H_
#define DATADIST_CHANNEL_ASKERS_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

namespace datadist {

class Askers {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;

  // At most so many that have left are remembered; guests can say any number.
  static constexpr size_t kMaxLeft = 4096;

  // `grace`: one that comes back so soon has not left.
  explicit Askers(std::chrono::milliseconds grace) : grace_(grace) {}

  // A connection says whose it is, and has ended. Cluster 0 is nobody.
  void Came(uint64_t cluster_id);
  void Left(uint64_t cluster_id, TimePoint now);

  // Clusters that have no connection any more, and will hardly have one; each once.
  std::vector<uint64_t> TakeLeft(TimePoint now);

 private:
  const std::chrono::milliseconds grace_;
  std::mutex mutex_;
  std::map<uint64_t, size_t> connections_;
  std::map<uint64_t, TimePoint> left_;
};

}  // namespace datadist

#endif  // DATADIST_CHANNEL_ASKERS_H_
