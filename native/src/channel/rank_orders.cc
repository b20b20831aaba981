#include "channel/rank_orders.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace datadist {
namespace {

// Of those of roles there is one for each rank at most.
size_t SizeOf(const Watched &watched) {
  return watched.role.has_value() ? 0 : sizeof(Watched) + watched.blob.size();
}

}  // namespace

bool RankOrders::PutOnLoop(Offer offer) {
  Rank &rank = ranks_[offer.rank];
  Watched order{0, offer.token, offer.offer_id, std::move(offer.blob)};
  if (SizeOf(order) > kMostBytes - bytes_) {
    return false;
  }
  PutOnLoop(rank, std::move(order));
  return true;
}

std::set<RankId> RankOrders::PutRoleOnLoop(const RoleOrder &order) {
  role_ = order;
  std::set<RankId> told;
  for (auto &[id, rank] : ranks_) {
    if (rank.has_asked) {
      told.insert(id);
      const auto is_role = [](const Watched &each) { return each.role.has_value(); };
      rank.waiting.erase(std::remove_if(rank.waiting.begin(), rank.waiting.end(), is_role), rank.waiting.end());
      PutOnLoop(rank, Watched{0, {}, 0, {}, order});
    }
  }
  return told;
}

void RankOrders::PutOnLoop(Rank &rank, Watched order) {
  order.number = ++rank.last;
  bytes_ += SizeOf(order);
  rank.waiting.push_back(std::move(order));
  if (rank.parked.has_value()) {
    SettleOnLoop(rank, rank.waiting.front());
  }
}

void RankOrders::WatchOnLoop(uint64_t guest, uint32_t seq, const Watch &watch) {
  Rank &rank = ranks_[watch.rank];
  if (rank.parked.has_value()) {
    SettleOnLoop(rank, {});
  }
  if (!std::exchange(rank.has_asked, true) && role_.has_value()) {
    PutOnLoop(rank, Watched{0, {}, 0, {}, *role_});
  }
  while (!rank.waiting.empty() && rank.waiting.front().number <= watch.seen) {
    bytes_ -= SizeOf(rank.waiting.front());
    rank.waiting.pop_front();
  }
  if (!rank.waiting.empty()) {
    answer_(guest, seq, rank.waiting.front());
    return;
  }
  const auto over = EventLoop::Clock::now() + std::chrono::milliseconds(watch.patience_ms);
  const uint64_t timer = loop_.StartTimerOnLoop(over, [this, &rank] { SettleOnLoop(rank, {}); });
  rank.parked = Parked{guest, seq, timer};
}

// What answers it stays, until the rank says that it has seen it.
void RankOrders::SettleOnLoop(Rank &rank, const Watched &watched) {
  const Parked parked = *rank.parked;
  rank.parked.reset();
  loop_.StopTimerOnLoop(parked.timer);
  answer_(parked.guest, parked.seq, watched);
}

void RankOrders::DropOnLoop(uint64_t guest) {
  for (auto &[id, rank] : ranks_) {
    if (rank.parked.has_value() && rank.parked->guest == guest) {
      loop_.StopTimerOnLoop(rank.parked->timer);
      rank.parked.reset();
    }
  }
}

}  // namespace datadist
