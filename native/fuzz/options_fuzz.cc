// Options of Initialize: input = JSON or a map, text; a map is "key=value" between zeros.
#include <limits>
#include <string>
#include <string_view>

#include "engine/json_check.h"
#include "engine/options.h"
#include "fuzz/fuzz.h"
#include "llm_datadist/llm_datadist_ext.h"

namespace datadist::fuzz {
namespace {

enum Kind : uint8_t { kJson, kMap };

void Json(const std::string &text) {
  const Result<JsonMembers> members = ParseJsonObject(text);
  if (members.ok()) {
    for (const auto &[key, value] : members.value()) {
      const Result<JsonMembers> again = ParseJsonObject("{\"" + key + "\":" + value + "}");
      FUZZ_CHECK(again.ok() && again.value().size() == 1 && again.value().at(key) == value);
    }
  }
  FUZZ_CHECK(text.empty() || members.ok() || !ParseLocalCommRes(text).ok());
  const Result<PoolConfig> pool = ParsePoolConfig("pool", text);
  if (pool.ok()) {
    FUZZ_CHECK(pool.value().memory_size > 0 && pool.value().page_shift >= 10 && pool.value().page_shift <= 30);
    FUZZ_CHECK((pool.value().memory_size >> pool.value().page_shift) < std::numeric_limits<uint32_t>::max());
  }
}

OptionMap MapOf(std::string_view text) {
  OptionMap map;
  while (!text.empty()) {
    const std::string_view entry = text.substr(0, text.find('\0'));
    text.remove_prefix(std::min(entry.size() + 1, text.size()));
    const std::string key(entry.substr(0, entry.find('=')));
    const std::string value(entry.substr(std::min(key.size() + 1, entry.size())));
    map[ge::AscendString(key.c_str())] = ge::AscendString(value.c_str());
  }
  // The file that it names is no business of a fuzzer's.
  map.erase(ge::AscendString(llm_datadist::OPTION_AUTH_KEY_FILE));
  return map;
}

void Options(const OptionMap &map) {
  for (const EngineApi api : {EngineApi::kCpp, EngineApi::kPython}) {
    Result<EngineOptions> options = ParseEarlyOptions(llm_datadist::LlmRole::kMix, api, map);
    if (options.ok() && ParseLateOptions(map, options.value()).ok()) {
      const EngineOptions &given = options.value();
      FUZZ_CHECK(given.device_id >= 0);
      FUZZ_CHECK(given.transfer_threads >= 1 && given.transfer_threads <= 64);
      FUZZ_CHECK(given.link.tcp_streams >= 1 && given.link.tcp_streams <= 16);
      FUZZ_CHECK(given.link.transfer_timeout.count() > 0 && given.link.heartbeat_interval.count() > 0);
      FUZZ_CHECK(given.limits.max_addrs_per_cache <= kMaxTensorsPerCache);
    }
  }
}

}  // namespace
}  // namespace datadist::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  using namespace datadist::fuzz;  // NOLINT(google-build-using-namespace): this file's own
  Input input(data, size);
  switch (input.U8()) {
    case kJson:
      Json(input.RestAsText());
      break;
    case kMap:
      Options(MapOf(input.RestAsText()));
      break;
    default:
      break;
  }
  return 0;
}
