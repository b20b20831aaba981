#include "channel/parked_awaits.h"

#include <algorithm>
#include <vector>

namespace datadist {
namespace {

bool IsNews(const HandoffNews &news, const Await &await) {
  const bool is_over = news.state == HandoffState::kSealed || news.state == HandoffState::kEnded;
  return news.stamp != await.seen_stamp || (is_over && news.version != await.seen_version);
}

}  // namespace

void ParkedAwaits::TakeOnLoop(uint64_t guest, uint32_t seq, const Await &await) {
  if (const HandoffNews news = Look(await); IsNews(news, await)) {
    answer_(guest, seq, news);
    return;
  }
  const uint64_t id = ++last_id_;
  const auto over = EventLoop::Clock::now() + std::chrono::milliseconds(await.patience_ms);
  const uint64_t timer = loop_.StartTimerOnLoop(over, [this, id] { AnswerOnLoop(id, Look(parked_.at(id).await)); });
  parked_.emplace(id, Parked{guest, seq, await, timer});
  by_token_.emplace(await.token, id);
  by_guest_[guest].insert(id);
}

void ParkedAwaits::OnNewsOnLoop(const LeaseToken &token) {
  std::vector<uint64_t> ids;
  for (auto it = by_token_.lower_bound({token, 0}); it != by_token_.end() && it->first == token; ++it) {
    ids.push_back(it->second);
  }
  for (const uint64_t id : ids) {
    // Gone: an answer to another has made its guest leave.
    const auto parked = parked_.find(id);
    if (parked == parked_.end()) {
      continue;
    }
    if (const HandoffNews news = Look(parked->second.await); IsNews(news, parked->second.await)) {
      AnswerOnLoop(id, news);
    }
  }
}

void ParkedAwaits::AnswerOnLoop(uint64_t id, const HandoffNews &news) {
  const auto [guest, seq] = std::make_pair(parked_.at(id).guest, parked_.at(id).seq);
  ForgetOnLoop(id);
  answer_(guest, seq, news);
}

void ParkedAwaits::ForgetOnLoop(uint64_t id) {
  const auto parked = parked_.find(id);
  loop_.StopTimerOnLoop(parked->second.timer);
  by_token_.erase({parked->second.await.token, id});
  const auto guest = by_guest_.find(parked->second.guest);
  guest->second.erase(id);
  if (guest->second.empty()) {
    by_guest_.erase(guest);
  }
  parked_.erase(parked);
}

void ParkedAwaits::DropOnLoop(uint64_t guest) {
  for (auto left = by_guest_.find(guest); left != by_guest_.end(); left = by_guest_.find(guest)) {
    ForgetOnLoop(*left->second.begin());
  }
}

size_t ParkedAwaits::CountOf(uint64_t guest) const {
  const auto found = by_guest_.find(guest);
  return found == by_guest_.end() ? 0 : found->second.size();
}

uint64_t ParkedAwaits::GuestWithMost() const {
  return std::max_element(by_guest_.begin(), by_guest_.end(),
                          [](const auto &a, const auto &b) { return a.second.size() < b.second.size(); })
      ->first;
}

}  // namespace datadist
