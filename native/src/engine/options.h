// The option map of Initialize, checked and typed.
#ifndef DATADIST_ENGINE_OPTIONS_H_
#define DATADIST_ENGINE_OPTIONS_H_

#include <cstdint>
#include <map>
#include <optional>

#include "base/status.h"
#include "cache/memory_pool.h"
#include "control/address.h"
#include "link/endpoint.h"
#include "llm_datadist/llm_datadist.h"
#include "memory/region_table.h"

namespace datadist {

using OptionMap = std::map<ge::AscendString, ge::AscendString>;

// Whose defaults hold: the C++ class, where remote access is always on, or the Python API, where it must be asked for
// and the number of registered addresses is limited.
enum class EngineApi : uint8_t { kCpp, kPython };

struct EngineOptions {
  int32_t device_id = 0;
  std::optional<SocketAddress> listen;
  bool comm_res_given = false;
  LinkOptions link;
  RegionLimits limits;
  std::optional<PoolConfig> device_pool;
  std::optional<PoolConfig> host_pool;
  size_t transfer_threads = 2;
  bool huge_pages = false;
};

// The API promises an order of checks, with the listener's bind in the middle: hence two steps. Every failure is
// LLM_PARAM_INVALID and names option, value and what is allowed.
//
// Before the bind: role, device id, listen address, backend.
Result<EngineOptions> ParseEarlyOptions(llm_datadist::LlmRole role, EngineApi api, const OptionMap &map);
// After it: transfer timeout, memory pools, numbers of the internal keys, options of this engine. Unknown keys are
// ignored, except under "datadist.", which is ours: there one is a slip of the pen.
Status ParseLateOptions(const OptionMap &map, EngineOptions &options);

Status CheckRole(llm_datadist::LlmRole role);
// OPTION_LISTEN_IP_INFO, of Initialize or SetRole; nothing when it is absent.
Result<std::optional<SocketAddress>> ParseListenOption(const OptionMap &map);

}  // namespace datadist

#endif  // DATADIST_ENGINE_OPTIONS_H_
