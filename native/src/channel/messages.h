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
//
// Answers have the seq of their request. Every request is idempotent: one whose answer was lost is sent again. Whoever may
// enter can ask for a geometry; only the holder of a lease's random token can renew, confirm or release it. CONFIRM changes
// nothing.
#ifndef DATADIST_CHANNEL_MESSAGES_H_
#define DATADIST_CHANNEL_MESSAGES_H_

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "channel/lease_table.h"
#include "control/frame.h"
#include "control/messages.h"

namespace datadist {

// One life of the process that grants leases; a restarted one has another. Random.
using GrantorIncarnation = std::array<uint8_t, 16>;

constexpr size_t kMaxLeasesPerMessage = 4096;
constexpr size_t kMaxEngineId = 2048;
constexpr uint16_t kMaxRank = 4095;

struct ChannelGreeting {
  VersionRange versions;
  uint16_t content_version = 0;  // of what the engine does not look into: geometries, and what digests are of
};

struct RankId {
  uint16_t pp_rank = 0;
  uint16_t tp_rank = 0;
  bool operator<(const RankId &other) const {
    return std::make_pair(pp_rank, tp_rank) < std::make_pair(other.pp_rank, other.tp_rank);
  }
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

std::vector<uint8_t> Encode(const ChannelGreeting &message);
std::vector<uint8_t> Encode(const DescribeRank &message);
std::vector<uint8_t> Encode(const RankAnswer &message);
std::vector<uint8_t> Encode(const Renew &message);
std::vector<uint8_t> Encode(const Renewed &message);
std::vector<uint8_t> Encode(const Confirm &message);
std::vector<uint8_t> Encode(const Confirmed &message);
std::vector<uint8_t> Encode(const Release &message);

// The largest geometry that fits into a RANK.
constexpr size_t kMaxGeometry = kMaxFrameBody - 4096;

}  // namespace datadist

#endif  // DATADIST_CHANNEL_MESSAGES_H_
