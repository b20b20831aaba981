// What an instance's ranks are told: which blocks a D offers them to write into, and that the instance changes its role.
// Each rank asks for what it has not seen (WATCH) and gets one order at a time, in their order; what it says it has seen
// is forgotten. On the loop only.
#ifndef DATADIST_CHANNEL_RANK_ORDERS_H_
#define DATADIST_CHANNEL_RANK_ORDERS_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <utility>

#include "channel/messages.h"
#include "control/event_loop.h"

namespace datadist {

class RankOrders {
 public:
  // To a WATCH that is parked no more. May drop guests.
  using Answer = std::function<void(uint64_t guest, uint32_t seq, const Watched &watched)>;
  // Of offers that no rank has taken yet; a rank that never asks is one that cannot write.
  static constexpr size_t kMostBytes = 64U << 20;

  // `loop` outlives it, or has been stopped.
  RankOrders(EventLoop &loop, Answer answer) : loop_(loop), answer_(std::move(answer)) {}
  RankOrders(const RankOrders &) = delete;
  RankOrders &operator=(const RankOrders &) = delete;

  // False: there are too many.
  bool PutOnLoop(Offer offer);
  // To all ranks, and to each that asks for the first time later. Returns those that have asked so far: one that never
  // did has linked with nobody.
  std::set<RankId> PutRoleOnLoop(const RoleOrder &order);
  // A rank asks once at a time: an older question of it is answered by nothing.
  void WatchOnLoop(uint64_t guest, uint32_t seq, const Watch &watch);
  void DropOnLoop(uint64_t guest);

 private:
  struct Parked {
    uint64_t guest;
    uint32_t seq;
    uint64_t timer;
  };
  struct Rank {
    uint64_t last = 0;
    std::deque<Watched> waiting;
    std::optional<Parked> parked;
    bool has_asked = false;
  };
  void PutOnLoop(Rank &rank, Watched order);
  void SettleOnLoop(Rank &rank, const Watched &watched);

  EventLoop &loop_;
  const Answer answer_;
  std::map<RankId, Rank> ranks_;  // those that exist, as the server knows them
  size_t bytes_ = 0;
  std::optional<RoleOrder> role_;
};

}  // namespace datadist

#endif  // DATADIST_CHANNEL_RANK_ORDERS_H_
