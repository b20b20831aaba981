// The JSON options of the API. The engine uses little of them: most describe devices that a host does not have.
#ifndef DATADIST_ENGINE_JSON_CHECK_H_
#define DATADIST_ENGINE_JSON_CHECK_H_

#include <map>
#include <string>
#include <string_view>

#include "base/status.h"
#include "cache/memory_pool.h"

namespace datadist {

// The members of an object: its keys as they are written between their quotes, its values as they are written. Of a key
// that comes twice the last value counts.
using JsonMembers = std::map<std::string, std::string>;

// Whether the text is one well-formed object; LLM_PARAM_INVALID, with the position, otherwise. Nesting is limited, so
// that no text can exhaust the stack.
Result<JsonMembers> ParseJsonObject(std::string_view text);

// The version of OPTION_LOCAL_COMM_RES, which is an object of a known version, or empty and then without one.
Result<std::string> ParseLocalCommRes(std::string_view text);

// `option` says whose value the text is.
Result<PoolConfig> ParsePoolConfig(const char *option, std::string_view text);

}  // namespace datadist

#endif  // DATADIST_ENGINE_JSON_CHECK_H_
