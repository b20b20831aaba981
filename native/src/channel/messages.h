// What the frames of the channel say, by which a D asks a P for what is no KV. As in control/messages.h every decoder
// refuses values outside their range and trailing bytes.
//
//   D                                        P
//   CHANNEL ─────────────────────────────────>  the versions that I speak
//         <────────────────────── CHANNEL_READY                                               (or REJECT)
//   DESCRIBE_RANK ───────────────────────────>  how does the KV cache of that worker rank lie?
//         <─────────────────────────────── RANK
//   RENEW ───────────────────────────────────>  keep these leases on
//         <──────────────────────────── RENEWED  which of them are gone
//   CONFIRM ─────────────────────────────────>  was this lease held while I read?
//         <────────────────────────── CONFIRMED
//   RELEASE ─────────────────────────────────>  I need these leases no more
//         <─────────────────────────── RELEASED
//   AWAIT ───────────────────────────────────>  what is new of this hand-off since I asked?
//         <──────────────────────────── HANDOFF  once there is something, or my patience is over
//   OFFER ───────────────────────────────────>  that rank may write what it has of this hand-off into blocks of mine
//         <──────────────────────────── OFFERED
//
//   a worker of P                            P
//   REPORT ──────────────────────────────────>  my rank is so far with these hand-offs
//         <─────────────────────────── REPORTED
//   WATCH ───────────────────────────────────>  what was my rank offered or told since I asked?
//         <──────────────────────────── WATCHED  once there is something, or my patience is over
//   DELIVER ─────────────────────────────────>  so much of it has my rank written into the blocks of that D
//         <─────────────────────────── REPORTED
//   DECLARE ─────────────────────────────────>  that is what has become of my rank's order to change its role
//         <─────────────────────────── REPORTED
//
//   an operator                              an instance
//   SWITCH ──────────────────────────────────>  be of that role from now on
//         <─────────────────────────── SWITCHED  once it is or will not be, or my patience is over
//
// Answers have the seq of their request, and come in any order. Every request is idempotent: one whose answer was lost is
// sent again. Whoever may enter can ask for a geometry; only the holder of a lease's random token can renew, confirm or
// release it, or await the hand-off that becomes it, or offer blocks for it; only who has the instance's own key can
// report, watch, deliver or declare; only whom the kernel names, or who has proven the shared key, can switch. CONFIRM
// changes nothing.
#ifndef DATADIST_CHANNEL_MESSAGES_H_
#define DATADIST_CHANNEL_MESSAGES_H_

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "channel/handoff.h"
#include "channel/lease_table.h"
#include "channel/role.h"
#include "control/frame.h"
#include "control/messages.h"

namespace datadist {

// One life of the process that grants leases; a restarted one has another. Random.
using GrantorIncarnation = std::array<uint8_t, 16>;

constexpr size_t kMaxLeasesPerMessage = 4096;
constexpr size_t kMaxEngineId = 2048;
constexpr uint16_t kMaxRank = 4095;
constexpr uint32_t kMaxPatienceMs = 30'000;  // shorter than anything that lies on the way forgets a silent connection
constexpr size_t kMaxMarksPerReport = 128;

struct ChannelGreeting {
  VersionRange versions;
  uint16_t content_version = 0;  // of what the engine does not look into: geometries, and what digests are of
};

struct DescribeRank {
  std::string engine_id;
  GrantorIncarnation incarnation{};
  RankId rank;
  uint64_t asker = 0;  // the cluster that will link with that rank; 0: none will
};

struct RankAnswer {
  Status status;
  std::vector<uint8_t> geometry;  // empty unless status is ok
};

struct Renew {
  std::vector<LeaseToken> tokens;
  bool pulling = false;  // and do not only wait for my turn
};

struct Renewed {
  std::vector<LeaseToken> gone;
};

struct Confirm {
  LeaseToken token{};
  uint64_t generation = 0;
  LeaseContent content;
};

struct Confirmed {
  LeaseVerdict verdict = LeaseVerdict::kGone;
};

struct Release {
  std::vector<LeaseToken> tokens;
};

// Answered by HandoffNews.
struct Await {
  LeaseToken token{};
  std::optional<RankId> rank;  // whose progress is news, too
  uint32_t seen_version = 0;
  uint64_t seen_stamp = 0;
  uint32_t patience_ms = 0;
  uint64_t offer_id = 0;  // then what `rank` has delivered by it is news, and not its progress
};

constexpr size_t kMaxOffer = kMaxFrameBody - 4096;

struct Offer {
  LeaseToken token{};
  RankId rank;
  uint64_t offer_id = 0;      // D's choice; not 0
  std::vector<uint8_t> blob;  // only Python reads it
};

struct Offered {
  Status status;
};

struct Watch {
  HandoffKey key{};
  RankId rank;
  uint64_t seen = 0;
  uint32_t patience_ms = 0;
};

struct Watched {
  uint64_t number = 0;  // counts from 1; 0: nothing is new, and the rest is empty
  LeaseToken token{};
  uint64_t offer_id = 0;
  std::vector<uint8_t> blob;
  std::optional<RoleOrder> role = std::nullopt;  // instead of all that an offer has
};

// Answered by REPORTED.
struct Declare {
  HandoffKey key{};
  RankId rank;
  uint64_t attempt = 0;
  std::string reason;  // why it has not been done; empty: it has
};

constexpr uint32_t kMaxDrainMs = 86'400'000;

// Answered by SwitchStatus.
struct Switch {
  SwitchId id{};
  InstanceRole role = InstanceRole::kBoth;  // not kNone
  uint32_t drain_ms = 0;
  uint32_t patience_ms = 0;
};

// Answered by REPORTED.
struct Deliver {
  HandoffKey key{};
  RankId rank;
  LeaseToken token{};
  uint64_t offer_id = 0;
  Delivery delivery;
};

struct ReportProgress {
  HandoffKey key{};
  RankId rank;
  std::vector<std::pair<LeaseToken, ProgressMark>> marks;
};

std::vector<uint8_t> Encode(const ChannelGreeting &message);
std::vector<uint8_t> Encode(const DescribeRank &message);
std::vector<uint8_t> Encode(const RankAnswer &message);
std::vector<uint8_t> Encode(const Renew &message);
std::vector<uint8_t> Encode(const Renewed &message);
std::vector<uint8_t> Encode(const Confirm &message);
std::vector<uint8_t> Encode(const Confirmed &message);
std::vector<uint8_t> Encode(const Release &message);
std::vector<uint8_t> Encode(const Await &message);
std::vector<uint8_t> Encode(const HandoffNews &message);
std::vector<uint8_t> Encode(const ReportProgress &message);
std::vector<uint8_t> Encode(const Offer &message);
std::vector<uint8_t> Encode(const Offered &message);
std::vector<uint8_t> Encode(const Watch &message);
std::vector<uint8_t> Encode(const Watched &message);
std::vector<uint8_t> Encode(const Deliver &message);
std::vector<uint8_t> Encode(const Declare &message);
std::vector<uint8_t> Encode(const Switch &message);
std::vector<uint8_t> Encode(const SwitchStatus &message);

// The largest geometry that fits into a RANK.
constexpr size_t kMaxGeometry = kMaxFrameBody - 4096;

}  // namespace datadist

#endif  // DATADIST_CHANNEL_MESSAGES_H_
