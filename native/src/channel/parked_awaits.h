// AWAITs that have no answer yet: of which hand-off, of which guest, and until when. On the loop only.
//
// News of one hand-off costs what waits for it, however many wait for others.
#ifndef DATADIST_CHANNEL_PARKED_AWAITS_H_
#define DATADIST_CHANNEL_PARKED_AWAITS_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <utility>

#include "channel/handoff_table.h"
#include "channel/messages.h"
#include "control/event_loop.h"

namespace datadist {

class ParkedAwaits {
 public:
  // One that is parked no more. May drop guests.
  using Answer = std::function<void(uint64_t guest, uint32_t seq, const HandoffNews &news)>;

  // `loop` outlives it, or has been stopped.
  ParkedAwaits(EventLoop &loop, HandoffTable &handoffs, Answer answer)
      : loop_(loop), handoffs_(handoffs), answer_(std::move(answer)) {}
  ParkedAwaits(const ParkedAwaits &) = delete;
  ParkedAwaits &operator=(const ParkedAwaits &) = delete;

  // Answers at once if there is news, else when there is or when its patience is over.
  void TakeOnLoop(uint64_t guest, uint32_t seq, const Await &await);
  void OnNewsOnLoop(const LeaseToken &token);
  void DropOnLoop(uint64_t guest);

  size_t size() const { return parked_.size(); }
  size_t CountOf(uint64_t guest) const;
  // The guest with the most of them; only where there are any.
  uint64_t GuestWithMost() const;

 private:
  struct Parked {
    uint64_t guest;
    uint32_t seq;
    Await await;
    uint64_t timer;
  };
  void ForgetOnLoop(uint64_t id);
  void AnswerOnLoop(uint64_t id, const HandoffNews &news);
  HandoffNews Look(const Await &await) {
    return handoffs_.Look(await.token, await.rank, await.seen_version, await.offer_id);
  }

  EventLoop &loop_;
  HandoffTable &handoffs_;
  const Answer answer_;
  uint64_t last_id_ = 0;
  std::map<uint64_t, Parked> parked_;
  std::set<std::pair<LeaseToken, uint64_t>> by_token_;
  std::map<uint64_t, std::set<uint64_t>> by_guest_;  // of guests that have any
};

}  // namespace datadist

#endif  // DATADIST_CHANNEL_PARKED_AWAITS_H_
