#include "engine/options.h"

#include <charconv>
#include <cstdlib>
#include <limits>
#include <string>
#include <string_view>

#include "engine/json_check.h"
#include "llm_datadist/llm_datadist_ext.h"

namespace datadist {
namespace {

using llm_datadist::LLM_PARAM_INVALID;

constexpr uint64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
constexpr uint64_t kMaxUint32 = std::numeric_limits<uint32_t>::max();
constexpr std::string_view kOwnPrefix = "datadist.";
constexpr char kRemoteAccessible[] = "llm.EnableRemoteCacheAccessible";
constexpr char kMemPoolConfig[] = "llm.MemPoolConfig";
constexpr char kHostMemPoolConfig[] = "llm.HostMemPoolConfig";
// What the Python API documents for register_cache and register_blocks_cache together.
constexpr uint64_t kPythonMaxRegisteredAddrs = 240;

std::optional<std::string_view> Find(const OptionMap &map, const char *key) {
  const auto it = map.find(ge::AscendString(key));
  if (it == map.end()) {
    return std::nullopt;
  }
  return std::string_view(it->second.GetString(), it->second.GetLength());
}

Status InvalidOption(const char *key, std::string_view value, const std::string &allowed) {
  return Status(LLM_PARAM_INVALID, std::string(key) + ": '" + std::string(value) + "', allowed: " + allowed);
}

// Digits only: no sign, no space.
Result<uint64_t> ParseNumber(const char *key, std::string_view value, uint64_t lowest, uint64_t highest) {
  uint64_t number = 0;
  const char *const end = value.data() + value.size();
  const auto [stopped, error] = std::from_chars(value.data(), end, number);
  if (error != std::errc() || stopped != end || number < lowest || number > highest) {
    return InvalidOption(key, value, "a number in " + std::to_string(lowest) + ".." + std::to_string(highest));
  }
  return number;
}

// Leaves `out` as it is when the option is absent.
template <typename T>
Status ReadNumber(const OptionMap &map, const char *key, uint64_t lowest, uint64_t highest, T &out) {
  const auto value = Find(map, key);
  if (!value.has_value()) {
    return Status::Ok();
  }
  const Result<uint64_t> number = ParseNumber(key, *value, lowest, highest);
  if (!number.ok()) {
    return number.status();
  }
  out = static_cast<T>(number.value());
  return Status::Ok();
}

Status ReadMillis(const OptionMap &map, const char *key, uint64_t lowest, uint64_t highest,
                  std::chrono::milliseconds &out) {
  uint64_t millis = static_cast<uint64_t>(out.count());
  const Status status = ReadNumber(map, key, lowest, highest, millis);
  out = std::chrono::milliseconds(millis);
  return status;
}

Status ReadTransport(const OptionMap &map, std::string &out) {
  const auto value = Find(map, llm_datadist::OPTION_TRANSPORT);
  if (!value.has_value() || *value == "auto") {
    return Status::Ok();
  }
  std::string allowed = "'auto'";
  for (const TransportEntry &transport : BuiltInTransports()) {
    if (*value == transport.name) {
      out = *value;
      return Status::Ok();
    }
    allowed += ", '" + transport.name + "'";
  }
  return InvalidOption(llm_datadist::OPTION_TRANSPORT, *value, allowed);
}

Status ReadPeerAccess(const OptionMap &map, PeerAccess &out) {
  const auto value = Find(map, llm_datadist::OPTION_PEER_ACCESS);
  if (!value.has_value()) {
    return Status::Ok();
  }
  for (const auto &[name, access] : {std::pair("read_write", PeerAccess::kReadWrite), {"read", PeerAccess::kRead},
                                     {"none", PeerAccess::kNone}, {"granted", PeerAccess::kGranted},
                                     {"read_granted", PeerAccess::kReadGranted}}) {
    if (*value == name) {
      out = access;
      return Status::Ok();
    }
  }
  return InvalidOption(llm_datadist::OPTION_PEER_ACCESS, *value,
                       "'read_write', 'read', 'none', 'granted', 'read_granted'");
}

Status ReadVerify(const OptionMap &map, Verify &out) {
  const auto value = Find(map, llm_datadist::OPTION_VERIFY);
  if (!value.has_value() || *value == "off") {
    return Status::Ok();
  }
  if (*value != "log" && *value != "fail") {
    return InvalidOption(llm_datadist::OPTION_VERIFY, *value, "'off', 'log', 'fail'");
  }
  out = *value == "log" ? Verify::kLog : Verify::kFail;
  return Status::Ok();
}

// An option, or for programs that cannot be changed a variable of the environment; empty: neither.
std::string OptionOrVariable(const OptionMap &map, const char *key, const char *variable) {
  if (const auto value = Find(map, key)) {
    return std::string(*value);
  }
  const char *const value = std::getenv(variable);
  return value != nullptr ? value : "";
}

Status ReadTrust(const OptionMap &map, Trust &trust) {
  constexpr char kKeyVariable[] = "DATADIST_AUTH_KEY_FILE";
  constexpr char kInsecureVariable[] = "DATADIST_INSECURE";
  const std::string insecure = OptionOrVariable(map, llm_datadist::OPTION_INSECURE, kInsecureVariable);
  if (!insecure.empty() && insecure != "0" && insecure != "1") {
    return InvalidOption(llm_datadist::OPTION_INSECURE, insecure, "'0', '1'");
  }
  trust.insecure = insecure == "1";
  const std::string path = OptionOrVariable(map, llm_datadist::OPTION_AUTH_KEY_FILE, kKeyVariable);
  if (!path.empty() && trust.insecure) {
    return Status(LLM_PARAM_INVALID, std::string(llm_datadist::OPTION_AUTH_KEY_FILE) + " (or " + kKeyVariable +
                                         ") and " + llm_datadist::OPTION_INSECURE + " (or " + kInsecureVariable +
                                         ") '1' exclude each other: whom a key keeps out, the other lets in");
  }
  if (!path.empty()) {
    Result<std::shared_ptr<KeyRing>> keys = KeyRing::FromFile(path);
    if (!keys.ok()) {
      return Status(LLM_PARAM_INVALID, std::string(llm_datadist::OPTION_AUTH_KEY_FILE) + ": " + keys.status().text());
    }
    trust.keys = std::move(keys).value();
  }
  return Status::Ok();
}

Status ReadPool(const OptionMap &map, const char *key, std::optional<PoolConfig> &out) {
  const auto value = Find(map, key);
  if (!value.has_value()) {
    return Status::Ok();
  }
  const Result<PoolConfig> config = ParsePoolConfig(key, *value);
  if (!config.ok()) {
    return config.status();
  }
  out = config.value();
  return Status::Ok();
}

Status ReadBackend(const OptionMap &map, EngineOptions &options) {
  const auto backend = Find(map, llm_datadist::OPTION_TRANSFER_BACKEND);
  if (!backend.has_value()) {
    return Status::Ok();
  }
  if (*backend != "hixl") {
    return InvalidOption(llm_datadist::OPTION_TRANSFER_BACKEND, *backend, "'hixl', or no such option");
  }
  if (!options.listen.has_value()) {
    return Status(LLM_PARAM_INVALID, std::string(llm_datadist::OPTION_TRANSFER_BACKEND) + " 'hixl' needs " +
                                         llm_datadist::OPTION_LISTEN_IP_INFO);
  }
  options.link.hixl_backend = true;
  const auto config = Find(map, llm_datadist::OPTION_GLOBAL_RESOURCE_CONFIG);
  if (config.has_value() && !config->empty()) {
    const auto checked = ParseJsonObject(*config);
    if (!checked.ok()) {
      return Status(LLM_PARAM_INVALID,
                    std::string(llm_datadist::OPTION_GLOBAL_RESOURCE_CONFIG) + ": " + checked.status().text());
    }
  }
  return Status::Ok();
}

// What is wrong with it is told when linking. Of version 1.3 the documentation says that links are not limited.
void ReadLocalCommRes(const OptionMap &map, EngineOptions &options) {
  const auto text = Find(map, llm_datadist::OPTION_LOCAL_COMM_RES).value_or("");
  const Result<std::string> version = ParseLocalCommRes(text);
  options.comm_res_given = !text.empty();
  if (!version.ok()) {
    options.link.local_comm_res = version.status();
  } else if (version.value() == "1.3") {
    options.link.max_links = std::numeric_limits<uint32_t>::max();
  }
}

// Keys that the Python layer of the API puts into the map. They have no effect here, but nonsense in them is refused.
Status CheckInternalKeys(const OptionMap &map) {
  struct Bounds {
    const char *key;
    uint64_t lowest;
    uint64_t highest;
  };
  constexpr Bounds kBounds[] = {
      {kRemoteAccessible, 0, 1},                 {"llm.RdmaTrafficClass", 0, kMaxUint32},
      {"llm.RdmaServiceLevel", 0, kMaxUint32},   {"llm.LinkTotalTime", 0, kMaxUint32},
      {"llm.LinkRetryCount", 1, 100},
  };
  for (const Bounds &bounds : kBounds) {
    uint64_t ignored = 0;
    if (Status status = ReadNumber(map, bounds.key, bounds.lowest, bounds.highest, ignored); !status.ok()) {
      return status;
    }
  }
  return Status::Ok();
}

Status CheckOwnKeys(const OptionMap &map) {
  constexpr const char *kOwnKeys[] = {
      llm_datadist::OPTION_TRANSPORT,        llm_datadist::OPTION_TRANSFER_THREADS,
      llm_datadist::OPTION_TCP_STREAMS,      llm_datadist::OPTION_HEARTBEAT_MS,
      llm_datadist::OPTION_MAX_LINKS,        llm_datadist::OPTION_MAX_ADDRS_PER_CACHE,
      llm_datadist::OPTION_MAX_DEVICE_BYTES, llm_datadist::OPTION_MAX_HOST_BYTES,
      llm_datadist::OPTION_HUGE_PAGES,       llm_datadist::OPTION_MAX_REGISTERED_ADDRS,
      llm_datadist::OPTION_PEER_ACCESS,      llm_datadist::OPTION_AUTH_KEY_FILE,
      llm_datadist::OPTION_INSECURE,         llm_datadist::OPTION_VERIFY,
  };
  std::string allowed;
  for (const char *key : kOwnKeys) {
    allowed += std::string(allowed.empty() ? "" : ", ") + key;
  }
  for (const auto &[key, value] : map) {
    const std::string_view name(key.GetString(), key.GetLength());
    bool known = name.substr(0, kOwnPrefix.size()) != kOwnPrefix;
    for (const char *own : kOwnKeys) {
      known = known || name == own;
    }
    if (!known) {
      return Status(LLM_PARAM_INVALID, "unknown option '" + std::string(name) + "' (value '" + value.GetString() +
                                           "'), allowed: " + allowed);
    }
  }
  return Status::Ok();
}

}  // namespace

Status CheckRole(llm_datadist::LlmRole role) {
  const auto value = static_cast<int32_t>(role);
  if (value < 1 || value > 3) {
    return Status(LLM_PARAM_INVALID, "role: " + std::to_string(value) + ", allowed: 1 (prompt), 2 (decoder), 3 (mix)");
  }
  return Status::Ok();
}

Result<std::optional<SocketAddress>> ParseListenOption(const OptionMap &map) {
  const auto listen = Find(map, llm_datadist::OPTION_LISTEN_IP_INFO);
  if (!listen.has_value()) {
    return std::optional<SocketAddress>();
  }
  const Result<SocketAddress> address = SocketAddress::Parse(*listen);
  if (!address.ok()) {
    return InvalidOption(llm_datadist::OPTION_LISTEN_IP_INFO, *listen,
                   "'ip:port' or '[ipv6]:port' (" + address.status().text() + ")");
  }
  return std::optional<SocketAddress>(address.value());
}

Result<EngineOptions> ParseEarlyOptions(llm_datadist::LlmRole role, EngineApi api, const OptionMap &map) {
  if (Status status = CheckRole(role); !status.ok()) {
    return status;
  }
  EngineOptions options;
  if (api == EngineApi::kPython) {
    options.link.remote_accessible = Find(map, kRemoteAccessible) == "1";
    options.limits.max_registered_addrs = kPythonMaxRegisteredAddrs;
  }
  const auto device_id = Find(map, llm_datadist::OPTION_DEVICE_ID);
  if (!device_id.has_value()) {
    return Status(LLM_PARAM_INVALID, std::string(llm_datadist::OPTION_DEVICE_ID) + ": missing, it is mandatory");
  }
  if (Status status = ReadNumber(map, llm_datadist::OPTION_DEVICE_ID, 0, kMaxInt32, options.device_id); !status.ok()) {
    return status;
  }
  const auto listen = ParseListenOption(map);
  if (!listen.ok()) {
    return listen.status();
  }
  options.listen = listen.value();
  if (Status status = ReadTrust(map, options.link.trust); !status.ok()) {
    return status;
  }
  if (Status status = ReadBackend(map, options); !status.ok()) {
    return status;
  }
  return options;
}

Status ParseLateOptions(const OptionMap &map, EngineOptions &options) {
  LinkOptions &link = options.link;
  RegionLimits &limits = options.limits;
  constexpr uint64_t kMaxBytes = std::numeric_limits<uint64_t>::max();
  ReadLocalCommRes(map, options);
  const Status checks[] = {
      ReadMillis(map, llm_datadist::OPTION_SYNC_CACHE_WAIT_TIME, 1, kMaxInt32, link.transfer_timeout),
      ReadPool(map, kMemPoolConfig, options.device_pool),
      ReadPool(map, kHostMemPoolConfig, options.host_pool),
      CheckInternalKeys(map),
      CheckOwnKeys(map),
      ReadTransport(map, link.forced_transport),
      ReadPeerAccess(map, limits.peer_access),
      ReadVerify(map, link.verify),
      ReadNumber(map, llm_datadist::OPTION_TRANSFER_THREADS, 1, 64, options.transfer_threads),
      ReadNumber(map, llm_datadist::OPTION_TCP_STREAMS, 1, 16, link.tcp_streams),
      ReadNumber(map, llm_datadist::OPTION_HUGE_PAGES, 0, 1, options.huge_pages),
      ReadMillis(map, llm_datadist::OPTION_HEARTBEAT_MS, 10, 60000, link.heartbeat_interval),
      ReadNumber(map, llm_datadist::OPTION_MAX_LINKS, 1, kMaxUint32, link.max_links),
      ReadNumber(map, llm_datadist::OPTION_MAX_ADDRS_PER_CACHE, 1, kMaxTensorsPerCache, limits.max_addrs_per_cache),
      ReadNumber(map, llm_datadist::OPTION_MAX_REGISTERED_ADDRS, 1, kMaxBytes, limits.max_registered_addrs),
      ReadNumber(map, llm_datadist::OPTION_MAX_DEVICE_BYTES, 0, kMaxBytes, limits.max_device_bytes),
      ReadNumber(map, llm_datadist::OPTION_MAX_HOST_BYTES, 0, kMaxBytes, limits.max_host_bytes),
  };
  for (const Status &status : checks) {
    if (!status.ok()) {
      return status;
    }
  }
  return Status::Ok();
}

}  // namespace datadist
