// How often each kind of call was made and how long it took, for the log: every 80 s where something happened, and at the
// end, at level INFO.
#ifndef DATADIST_ENGINE_STATISTICS_H_
#define DATADIST_ENGINE_STATISTICS_H_

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "base/status.h"
#include "control/event_loop.h"

namespace datadist {

class Statistics : public std::enable_shared_from_this<Statistics> {
 public:
  enum class Call : uint8_t { kLink, kUnlink, kPull, kPush };

  explicit Statistics(uint64_t cluster_id) : cluster_id_(cluster_id) {}

  // Runs `call`, a function that returns a Status, and counts it.
  template <typename Function>
  Status Count(Call kind, const Function &call) {
    const auto start = std::chrono::steady_clock::now();
    Status status = call();
    Add(kind, status.ok(), std::chrono::steady_clock::now() - start);
    return status;
  }

  // Logs from now on, unless INFO is not logged.
  void StartOnLoop(EventLoop *loop, std::chrono::milliseconds interval = std::chrono::seconds(80));
  // Logs what there is.
  void Log();

  // "pulls 3 (1 failed, mean 120 us, longest 300 us)" for each kind that was called.
  std::string Text() const;

 private:
  struct Counter {
    std::atomic<uint64_t> calls{0};
    std::atomic<uint64_t> failures{0};
    std::atomic<uint64_t> total_us{0};
    std::atomic<uint64_t> longest_us{0};
  };
  void Add(Call kind, bool ok, std::chrono::steady_clock::duration took);
  uint64_t TotalCalls() const;

  const uint64_t cluster_id_;
  std::array<Counter, 4> counters_;
  uint64_t logged_calls_ = 0;  // on the loop, and after its end
};

}  // namespace datadist

#endif  // DATADIST_ENGINE_STATISTICS_H_
