// D's side of leases: renews them from the arrival of a request until its KV cache is here, then releases.
//
//   Hold ──> kept ──┬── Release by its last user ──> released ──┬── held anew before P is told ──> kept
//      renewed      │   (P is told a moment later,              ├── P has heard it
//      several times│    again and again)                       └── it has run out anyway
//      per lease    ├── P says that it is gone ──> (forgotten)
//                   └── Lose ──> (forgotten)
//
// Independent of the engine's steps and of its interpreter: D may sit in a long compilation or an idle loop while P waits
// for a sign of life. P is told so soon, because a lease that nobody has asked for is short, and again when a pull
// begins: one that is being pulled is the last that P gives up. Several requests may share a lease (n > 1), of which the
// first may have its KV cache before the last has come. Whoever comes when P has been told is answered by P.
//
// Threads: any. No member but Close waits for anything but another member, or wakes a thread: a scheduler calls them in
// every step. What they have to say goes out together, a moment later. After fork() the child may only destroy it.
#ifndef DATADIST_CHANNEL_LEASE_KEEPER_H_
#define DATADIST_CHANNEL_LEASE_KEEPER_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>

#include "base/status.h"
#include "channel/lease_table.h"
#include "control/key_ring.h"

namespace datadist {

struct LeaseKeeperLimits {
  size_t leases = 1U << 16U;
  // What P has said of a lease is true for so long, or nearly: it may need the blocks itself.
  std::chrono::milliseconds news{250};
  std::chrono::milliseconds release_retry{1000};
  // From the last user's release to P's being told: requests that share a lease come together, or nearly.
  std::chrono::milliseconds release_after{50};
};

class LeaseKeeper {
 public:
  using Clock = std::chrono::steady_clock;
  enum class Standing : uint8_t {
    kGone,      // its blocks are not worth a pull
    kNotKnown,  // P is being asked, and has time left
    kStands,
  };
  struct Grantor {
    std::string ip;  // a literal
    uint16_t port = 0;
    bool operator<(const Grantor &other) const { return std::tie(ip, port) < std::tie(other.ip, other.port); }
  };

  // LLM_FAILED when the system refuses a thread or an eventfd.
  static Result<std::unique_ptr<LeaseKeeper>> Create(uint16_t content_version, const Trust &trust,
                                                     std::chrono::milliseconds answer_timeout,
                                                     const LeaseKeeperLimits &limits = {});
  ~LeaseKeeper();  // Close
  LeaseKeeper(const LeaseKeeper &) = delete;
  LeaseKeeper &operator=(const LeaseKeeper &) = delete;

  // Starts renewing a lease that lasts for `lease`, or adds a user to it. False if there are too many. `is_news`: P has
  // granted it just now; otherwise, or where it was released or gone before, StandingOf tells only what P says.
  bool Hold(const Grantor &grantor, const LeaseToken &token, Clock::duration lease, bool is_news);
  Standing StandingOf(const LeaseToken &token);
  // A user of the lease has begun to pull: P is told so, for as long as that can take.
  void Pulls(const LeaseToken &token, Clock::duration at_most);
  // P, which we are ourselves, has ended the lease.
  void Lose(const LeaseToken &token);
  // Takes one user off a lease; with the last one, P is told that its blocks are free.
  void Release(const LeaseToken &token);
  // Leases that are kept, and those whose release P has not heard.
  size_t size() const;

  // Leases that are still held run out by themselves. Idempotent.
  void Close();
  bool in_forked_child() const;

 private:
  class State;
  explicit LeaseKeeper(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace datadist

#endif  // DATADIST_CHANNEL_LEASE_KEEPER_H_
