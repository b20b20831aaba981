// The waiting operations of a TransferQueue and the order in which they may start. Plain bookkeeping: no threads, no
// locks, no clock of its own; TransferQueue guards it with its mutex.
#ifndef DATADIST_PROVIDER_LANES_H_
#define DATADIST_PROVIDER_LANES_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <optional>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "provider/operation.h"

namespace datadist {

struct WaitingOp {
  using Clock = std::chrono::steady_clock;

  uint64_t id = 0;
  uint64_t cluster_id = 0;
  Operation operation;
  Clock::time_point submitted;
  Clock::time_point deadline;
};

class Lanes {
 public:
  using Clock = WaitingOp::Clock;

  size_t waiting() const { return by_id_.size(); }

  void Add(WaitingOp op);

  // The first operation of the next lane in turn. That lane gives nothing more until Finish.
  std::optional<WaitingOp> Start();
  void Finish(uint64_t cluster_id);
  bool CanStart() const { return !turns_.empty(); }

  // Take out an operation that has not started.
  std::optional<WaitingOp> Remove(uint64_t id);
  std::vector<WaitingOp> RemoveExpired(Clock::time_point now);
  std::vector<WaitingOp> RemoveAll();

  std::optional<Clock::time_point> NextDeadline() const;

 private:
  struct Lane {
    std::list<WaitingOp> ops;
    bool running = false;
  };
  using LaneMap = std::map<uint64_t, Lane>;

  WaitingOp TakeOut(std::list<WaitingOp>::iterator op);

  // A lane exists while it holds or runs an operation; it stands in turns_ exactly while it holds some and runs none.
  LaneMap lanes_;
  std::deque<uint64_t> turns_;
  std::unordered_map<uint64_t, std::list<WaitingOp>::iterator> by_id_;
  std::set<std::pair<Clock::time_point, uint64_t>> deadlines_;
};

}  // namespace datadist

#endif  // DATADIST_PROVIDER_LANES_H_
