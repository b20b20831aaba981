#include "provider/lanes.h"

#include <algorithm>
#include <iterator>

namespace datadist {

void Lanes::Add(WaitingOp op) {
  Lane &lane = lanes_[op.cluster_id];
  if (lane.ops.empty() && !lane.running) {
    turns_.push_back(op.cluster_id);
  }
  deadlines_.emplace(op.deadline, op.id);
  const uint64_t id = op.id;
  lane.ops.push_back(std::move(op));
  by_id_.emplace(id, std::prev(lane.ops.end()));
}

std::optional<WaitingOp> Lanes::Start() {
  if (turns_.empty()) {
    return std::nullopt;
  }
  Lane &lane = lanes_.at(turns_.front());
  turns_.pop_front();
  // Before TakeOut, which drops a lane that neither holds nor runs anything.
  lane.running = true;
  return TakeOut(lane.ops.begin());
}

void Lanes::Finish(uint64_t cluster_id) {
  const auto found = lanes_.find(cluster_id);
  found->second.running = false;
  if (found->second.ops.empty()) {
    lanes_.erase(found);
  } else {
    turns_.push_back(cluster_id);
  }
}

std::optional<WaitingOp> Lanes::Remove(uint64_t id) {
  const auto found = by_id_.find(id);
  if (found == by_id_.end()) {
    return std::nullopt;
  }
  return TakeOut(found->second);
}

std::vector<WaitingOp> Lanes::RemoveExpired(Clock::time_point now) {
  std::vector<WaitingOp> expired;
  while (!deadlines_.empty() && deadlines_.begin()->first <= now) {
    expired.push_back(TakeOut(by_id_.at(deadlines_.begin()->second)));
  }
  return expired;
}

std::vector<WaitingOp> Lanes::RemoveAll() {
  std::vector<WaitingOp> removed;
  removed.reserve(by_id_.size());
  while (!by_id_.empty()) {
    removed.push_back(TakeOut(by_id_.begin()->second));
  }
  std::sort(removed.begin(), removed.end(), [](const WaitingOp &a, const WaitingOp &b) { return a.id < b.id; });
  return removed;
}

std::optional<Lanes::Clock::time_point> Lanes::NextDeadline() const {
  return deadlines_.empty() ? std::nullopt : std::make_optional(deadlines_.begin()->first);
}

WaitingOp Lanes::TakeOut(std::list<WaitingOp>::iterator op) {
  WaitingOp taken = std::move(*op);
  by_id_.erase(taken.id);
  deadlines_.erase({taken.deadline, taken.id});
  const auto found = lanes_.find(taken.cluster_id);
  found->second.ops.erase(op);
  if (found->second.ops.empty() && !found->second.running) {
    lanes_.erase(found);
    turns_.erase(std::find(turns_.begin(), turns_.end(), taken.cluster_id));
  }
  return taken;
}

}  // namespace datadist
