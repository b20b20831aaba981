// What an instance does for others, and what is said when that changes while it serves.
#ifndef DATADIST_CHANNEL_ROLE_H_
#define DATADIST_CHANNEL_ROLE_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace datadist {

// The number of a role is its duties, a bit for each: it gives KV, it takes KV.
enum class InstanceRole : uint8_t { kNone = 0, kPrefill = 1, kDecode = 2, kBoth = 3 };
constexpr size_t kInstanceRoles = 4;
constexpr bool Gives(InstanceRole role) { return (static_cast<uint8_t>(role) & 1U) != 0; }
constexpr bool Takes(InstanceRole role) { return (static_cast<uint8_t>(role) & 2U) != 0; }
constexpr const char *NameOf(InstanceRole role) {
  switch (role) {
    case InstanceRole::kNone:
      return "none";
    case InstanceRole::kPrefill:
      return "prefill";
    case InstanceRole::kDecode:
      return "decode";
    case InstanceRole::kBoth:
      return "both";
  }
  return "?";
}

// One wish to switch, however often it is said. Random.
using SwitchId = std::array<uint8_t, 16>;

// What a worker rank is to do: leave all links, and be of that role from then on.
struct RoleOrder {
  uint64_t attempt = 0;  // counts from 1; what a rank says of another one is void
  InstanceRole role = InstanceRole::kBoth;
  uint32_t limit_ms = 0;  // within which it says what has become of it
};

enum class SwitchState : uint8_t { kRefused, kDraining, kApplying, kDone };
constexpr size_t kSwitchStates = 4;

// How far a switch is.
struct SwitchStatus {
  SwitchState state = SwitchState::kRefused;
  InstanceRole role = InstanceRole::kNone;  // which the instance has, or had before
  uint32_t leases = 0;                      // this and all below: what it waits for
  uint32_t handoffs = 0;
  uint32_t taken = 0;  // requests whose KV is pulled here, or will be
  uint32_t ranks = 0;
  std::string reason = {};  // why it was refused
};

}  // namespace datadist

#endif  // DATADIST_CHANNEL_ROLE_H_
