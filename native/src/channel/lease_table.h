// P's promises to keep finished requests' blocks: the only place that knows which still stand.
//
//   Grant ──> held ──┬── Release (D is done, or will never come)
//                    ├── expiry (no renewal for its duration, or the limit after the grant)
//                    └── Revoke (P needs the blocks itself)
//
// Until the first renewal it lasts for its claim time only: most that are never renewed went to nobody.
//
// A lease leaves the table before its blocks go back to their owner, who learns of it from TakeEnded: a confirmation that
// succeeds proves that the blocks were the request's own until then.
//
// Threads: any. No member waits for anything but another member.
#ifndef DATADIST_CHANNEL_LEASE_TABLE_H_
#define DATADIST_CHANNEL_LEASE_TABLE_H_

#include <array>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"

namespace datadist {

using LeaseToken = std::array<uint8_t, 16>;     // random; whoever holds it may renew, confirm and release
using ContentDigest = std::array<uint8_t, 16>;  // collision resistant; what of, only its makers know

// What a lease is for: the prompt whose KV the blocks hold, and the blocks in their order.
struct LeaseContent {
  ContentDigest prompt{};
  ContentDigest blocks{};
};

enum class LeaseVerdict : uint8_t { kHeld, kGone, kOtherPrompt, kOtherBlocks };
constexpr size_t kLeaseVerdicts = 4;
// Why a read does not count; empty for kHeld.
const char *ReasonOf(LeaseVerdict verdict);

class LeaseTable {
 public:
  using Clock = std::chrono::steady_clock;
  using Now = std::function<Clock::time_point()>;

  struct Ticket {
    LeaseToken token{};
    uint64_t generation = 0;  // counts from 1
  };
  enum class End : uint8_t { kReleased, kExpired, kUnclaimed, kRevoked };
  struct Ended {
    std::string request_id;
    End why = End::kExpired;
    std::string asked_by;  // who renewed it last; empty: nobody did
  };
  struct Refusal {
    LeaseVerdict verdict = LeaseVerdict::kGone;
    std::string request_id;  // empty: of no lease that is remembered
    std::string asked_by;
  };
  struct Refused {
    uint64_t count = 0;
    std::vector<Refusal> first;  // a few of them: a peer can be refused as often as it likes
  };
  static constexpr size_t kMostRefusals = 32;
  // Leases whose requests are remembered when they have ended: whoever comes too late comes soon.
  static constexpr size_t kMostRemembered = 1024;
  // How long a lease lasts after its grant, and after each renewal.
  struct Durations {
    Clock::duration claim;
    Clock::duration renewed;
  };
  // Which leases may be revoked; each is one of the next.
  enum class Revocable : uint8_t {
    kUnclaimed,  // those that no D has renewed yet
    kIdle,       // those that no D says it is pulling right now
    kAll,
  };
  struct Amount {
    size_t leases = 0;
    uint64_t blocks = 0;
  };

  // `limit` is how long renewals can keep a lease that was not granted for longer.
  explicit LeaseTable(Clock::duration limit, Now now = &Clock::now) : limit_(limit), now_(std::move(now)) {}

  // Keeps `num_blocks` blocks; under `token`, if one was promised. LLM_FAILED without random bytes, LLM_PARAM_INVALID for a
  // token that is held.
  Result<Ticket> Grant(std::string request_id, const LeaseContent &content, uint64_t num_blocks, Durations durations,
                       const std::optional<LeaseToken> &token = std::nullopt);

  // `by`, here and below: who asks, for those who look for him.
  // Whether the lease stands, is that one, and is for this.
  LeaseVerdict Confirm(const LeaseToken &token, uint64_t generation, const LeaseContent &content,
                       const std::string &by);
  // Extends leases by their duration from now, within their limit; `pulling`: their D reads the blocks right now. Returns
  // the tokens that name none.
  std::vector<LeaseToken> Renew(const std::vector<LeaseToken> &tokens, bool pulling, const std::string &by);
  // Tokens that name no lease are no error.
  void Release(const std::vector<LeaseToken> &tokens);
  // Ends at most `most` such leases that were granted at least `age` ago, the oldest first; returns how many. A D that
  // reads one all the same is refused its confirmation.
  size_t Revoke(Revocable which, Clock::duration age, size_t most);
  // Ends that one unless it is being pulled; whether it did.
  bool RevokeIdle(const LeaseToken &token);

  // Another number after whatever makes any of the following say something new; the age counts in whole seconds. For those
  // who would ask for all of it in every step of a model, of which most change nothing.
  uint64_t Changes();
  // What ended since the last call, each once.
  std::vector<Ended> TakeEnded();
  // The confirmations that were refused since the last call.
  Refused TakeRefused();
  // Leases that a D has read and had confirmed since the last call, each once however many of its ranks confirm it.
  Amount TakeServed();
  Amount held() const;
  // How many stand now: those whose time is over end first.
  size_t Standing();
  // Since the first grant that is still held; 0 without one.
  Clock::duration OldestAge() const;

 private:
  struct Lease {
    std::string request_id;
    uint64_t generation;
    LeaseContent content;
    uint64_t num_blocks;
    Clock::duration duration;
    Clock::time_point granted;
    Clock::time_point expires;
    Clock::time_point limit;
    std::string asked_by = {};
    bool claimed = false;
    bool pulling = false;
    bool served = false;
  };
  using Leases = std::map<LeaseToken, Lease>;
  std::string RequestOfLocked(const LeaseToken &token) const;
  LeaseVerdict VerdictLocked(const LeaseToken &token, uint64_t generation, const LeaseContent &content) const;
  void ExpireLocked(Clock::time_point now);
  Leases::iterator EndLocked(Leases::iterator lease, End why);
  Clock::duration OldestAgeLocked(Clock::time_point now) const;
  static bool IsRevocable(const Lease &lease, Revocable which);

  const Clock::duration limit_;
  const Now now_;

  mutable std::mutex mutex_;  // guards all below
  Leases leases_;
  uint64_t last_generation_ = 0;
  uint64_t held_blocks_ = 0;
  uint64_t changes_ = 0;
  std::chrono::seconds told_age_{0};  // by Changes
  // By generation, which is their order: OldestAge is asked in every step of a model.
  std::map<uint64_t, Clock::time_point> grants_;
  // No lease expires before it; a lower bound, because TakeEnded is called in every step of a model.
  Clock::time_point next_expiry_ = Clock::time_point::max();
  std::vector<Ended> ended_;
  Refused refused_;
  std::map<LeaseToken, std::string> remembered_;  // the requests of leases that have ended
  std::deque<LeaseToken> remembered_order_;       // the oldest first
  Amount served_;
};

}  // namespace datadist

#endif  // DATADIST_CHANNEL_LEASE_TABLE_H_
