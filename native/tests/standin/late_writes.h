// Bytes that land after the call that asked for them has failed, as a device's may.
#ifndef DATADIST_TESTS_STANDIN_LATE_WRITES_H_
#define DATADIST_TESTS_STANDIN_LATE_WRITES_H_

#include <chrono>
#include <cstdint>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace standin {

// What is written: by then the peer's blocks hold somebody else's keys and values, so it is not what was asked for.
constexpr int kRubbish = 0x5A;

class LateWrites {
 public:
  using Ranges = std::vector<std::pair<uint64_t, uint64_t>>;  // address, bytes
  static constexpr uint64_t kAll = ~uint64_t{0};

  ~LateWrites() { Await(kAll); }

  // From now on the link is broken.
  void Add(uint64_t cluster_id, std::chrono::milliseconds delay, Ranges ranges);
  bool Broken(uint64_t cluster_id);
  // Returns when all has been written that comes over the link, which is whole again.
  void Await(uint64_t cluster_id);

 private:
  std::mutex mutex_;
  std::multimap<uint64_t, std::thread> writers_;  // by cluster
};

}  // namespace standin

#endif  // DATADIST_TESTS_STANDIN_LATE_WRITES_H_
