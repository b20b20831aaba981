// What the frames of the control connection say. All integers little-endian, texts with a length before them; every
// decoder refuses values outside their range and trailing bytes (LLM_FAILED: the connection is to be closed).
//
//   client                                   server
//   HELLO ───────────────────────────────────>  who am I; the token of the link that this one is to replace
//         <─────────────────────────── WELCOME  who am I; the link's token                     (or REJECT)
//   READY ───────────────────────────────────>  the transport of the transfers that I initiate
//         <───────────────────────────── READY  the same of the server                         (or REJECT)
//   ATTACH on each data connection ──────────>  (where a transport wants any)
//         <────────────────────────── ATTACHED
//   ESTABLISHED ─────────────────────────────>
//         <─────────────────────── ESTABLISHED
//
// Over TCP an opening by key comes before (opening.h). Transports are names here, and what they tell one another of an
// endpoint or a cache are blobs that only they read.
//
// From then on either end sends PING, DESCRIBE, PUSH, DIGEST, CONSUME and UNLINK, and the other answers PONG, CACHE_INFO,
// PUSHED, DIGESTS, CONSUMED and UNLINKED, with the seq of the request. UNLINK is also legal as the first and only message of a fresh
// connection: that is how a link is dropped whose own connection is gone.
#ifndef DATADIST_CONTROL_MESSAGES_H_
#define DATADIST_CONTROL_MESSAGES_H_

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "cache/cache_key.h"
#include "memory/remote_cache.h"

namespace datadist {

using Incarnation = std::array<uint8_t, 16>;  // one initialised endpoint; random
using LinkToken = std::array<uint8_t, 16>;    // one link; random, known to its two ends only

// Who has read the token on its way cannot make the proof. Zeros where the control connection has no key.
using StreamProof = std::array<uint8_t, 16>;

// Who one end is and where it stands.
struct EndpointInfo {
  uint64_t cluster_id = 0;
  int32_t role = 0;
  Incarnation incarnation{};
  bool remote_accessible = true;  // both ends of a link must agree
  std::vector<TransportOffer> transports;
};

struct VersionRange {
  uint16_t lowest = 0;
  uint16_t highest = 0;
};

struct Hello {
  VersionRange versions;
  EndpointInfo client;
  uint32_t remaining_ms = 0;
  bool force_link = false;  // the client knows of no live link with that server, and wants one anew
  LinkToken replaced{};     // of the lost link that it remembers; zeros: of none
  std::string comm_name;  // of a bilateral link; empty: a client links to a server
  int64_t comm_id = 0;    // the client's own: tells another attempt from a later comm of the same name
};

struct Welcome {
  EndpointInfo server;
  LinkToken token{};
};

struct Reject {
  Status status;
};

struct Ready {
  std::string transport;
  std::string reason;
};

// Who starts the transfers that a data connection carries.
enum class Initiator : uint8_t { kClient = 1, kServer = 2 };

struct Attach {
  LinkToken token{};
  Initiator initiator = Initiator::kClient;
  uint16_t index = 0;
  StreamProof proof{};  // that the sender is at the other end of the link's control connection
};

// What the owner told of a cache that we named.
struct RemoteTarget {
  RemoteCache cache;
  bool has_row = false;  // a request or prefix key says the row itself
  uint32_t row = 0;
  uint32_t tensor = 0;   // where an address lies
  uint64_t offset = 0;
  bool lasting = false;  // the name may be used again without asking
};

struct DescribeRequest {
  CacheRef ref;
};

struct CacheInfo {
  Status status;
  RemoteTarget target;  // of no meaning unless status is ok
};

// The sender has pulled tensors [first_tensor, +tensor_count) of that generation by the key.
struct ConsumeRequest {
  CacheKey key;
  uint64_t generation = 0;
  uint32_t first_tensor = 0;
  uint32_t tensor_count = 0;
};

struct Consumed {
  Status status;
};

// A push of a transport that does not write by itself: the sender asks the owner to read `runs` out of the sender's
// memory, because only who writes knows when the writing has ended. `source` is the sender's own cache; a run's
// remote_offset is in the tensors of `source`, its local_offset in those of the owner's cache.
struct PushRequest {
  int64_t cache_id = 0;
  uint64_t generation = 0;
  uint32_t first_tensor = 0;
  RemoteCache source;
  uint32_t source_first_tensor = 0;
  uint32_t tensor_count = 0;
  uint32_t remaining_ms = 0;
  std::vector<Run> runs;
};

// With the largest blob of a cache they fit into a frame.
constexpr size_t kMaxPushRuns = 16384;

struct Pushed {
  Status status;
};

// What do these bytes of that cache look like to their owner? A range is in each of the tensors.
struct DigestRequest {
  int64_t cache_id = 0;
  uint64_t generation = 0;
  uint32_t first_tensor = 0;
  uint32_t tensor_count = 0;
  uint32_t remaining_ms = 0;
  std::vector<Span> ranges;
};

constexpr size_t kMaxDigestRanges = 16384;

struct Digests {
  Status status;
  std::vector<uint32_t> values;  // per range, over its tensors in their order; empty unless status is ok
};

struct UnlinkRequest {
  uint64_t cluster_id = 0;  // of the sender
  LinkToken token{};
};

std::vector<uint8_t> Encode(const Hello &message);
std::vector<uint8_t> Encode(const Welcome &message);
std::vector<uint8_t> Encode(const Reject &message);
std::vector<uint8_t> Encode(const Ready &message);
std::vector<uint8_t> Encode(const Attach &message);
std::vector<uint8_t> Encode(const DescribeRequest &message);
std::vector<uint8_t> Encode(const CacheInfo &message);
std::vector<uint8_t> Encode(const PushRequest &message);
std::vector<uint8_t> Encode(const Pushed &message);
std::vector<uint8_t> Encode(const DigestRequest &message);
std::vector<uint8_t> Encode(const Digests &message);
std::vector<uint8_t> Encode(const ConsumeRequest &message);
std::vector<uint8_t> Encode(const Consumed &message);
std::vector<uint8_t> Encode(const UnlinkRequest &message);

// The start of a HELLO or OPEN body has one form in every version of the protocol.
Result<VersionRange> DecodeVersionRange(const std::vector<uint8_t> &body);
// LLM_LINK_FAILED, naming both, where a client of these versions does not speak ours.
Status CheckVersions(const VersionRange &client);

// Decode<Hello>(body) and so on for every message with a body.
template <typename Message>
Result<Message> Decode(const std::vector<uint8_t> &body);

// PING, PONG, ATTACHED, ESTABLISHED, UNLINKED.
Status DecodeEmpty(const std::vector<uint8_t> &body);

}  // namespace datadist

#endif  // DATADIST_CONTROL_MESSAGES_H_
