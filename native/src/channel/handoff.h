// What is said of a hand-off: a request whose KV a D may read while P still prefills it. Its token is the one that its
// lease will have.
#ifndef DATADIST_CHANNEL_HANDOFF_H_
#define DATADIST_CHANNEL_HANDOFF_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "channel/lease_table.h"
#include "control/frame.h"

namespace datadist {

struct RankId {
  uint16_t pp_rank = 0;
  uint16_t tp_rank = 0;
  bool operator<(const RankId &other) const {
    return std::make_pair(pp_rank, tp_rank) < std::make_pair(other.pp_rank, other.tp_rank);
  }
};

// Proves a worker of the very instance whose table it is of. Random; the workers have it from their scheduler.
using HandoffKey = std::array<uint8_t, 16>;

// A blob fits into a HANDOFF beside all else that one says.
constexpr size_t kMaxHandoffBlob = kMaxFrameBody - 4096;
constexpr size_t kMaxLayerBytes = 512;

enum class HandoffState : uint8_t { kUnknown, kPromised, kBegun, kSealed, kEnded };
constexpr size_t kHandoffStates = 5;

// How far one rank is: of all its layers tokens [0, base) are final, and of those whose bits are set [0, next).
struct ProgressMark {
  uint32_t epoch = 0;
  uint32_t base = 0;
  uint32_t next = 0;
  std::vector<uint8_t> layers;  // layer i: bit i % 8 of byte i / 8
};

// What a rank of P has written of it into blocks that a rank of D has offered. Several requests of one D may take one
// hand-off, each into blocks of its own: each offer has an id.
enum class DeliveryState : uint8_t { kNone, kOffered, kRunning, kDone, kFailed };
constexpr size_t kDeliveryStates = 5;

struct Delivery {
  DeliveryState state = DeliveryState::kNone;
  uint32_t epoch = 0;        // of the blocks that were written from
  uint64_t bytes = 0;        // in that epoch
  uint64_t early_bytes = 0;  // of these, before it was sealed
  uint64_t run_us = 0;       // that the writing took
  std::string reason = {};   // why it failed
};

struct HandoffNews {
  HandoffState state = HandoffState::kUnknown;
  uint32_t epoch = 0;    // of the blocks: another after a preemption, and marks of an earlier one are void
  uint32_t version = 0;  // of state, epoch and blob
  uint64_t stamp = 0;    // of all that whoever asks can see
  std::optional<std::vector<uint8_t>> blob;  // only P's and D's Python read it; none: as seen
  ProgressMark mark;     // of the rank that was asked for
  std::string reason;    // why it ended
  Delivery delivery = {};  // of the pair of ranks that was asked for
};

}  // namespace datadist

#endif  // DATADIST_CHANNEL_HANDOFF_H_
