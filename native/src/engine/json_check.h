// Whether a text is one well-formed JSON object, and what its top-level "version" says. The engine uses nothing else of
// the JSON options of the API: they describe devices that a host does not have.
#ifndef DATADIST_ENGINE_JSON_CHECK_H_
#define DATADIST_ENGINE_JSON_CHECK_H_

#include <string>
#include <string_view>

#include "base/status.h"

namespace datadist {

struct JsonObjectInfo {
  bool has_version = false;
  std::string version;  // the text between the quotes
};

// LLM_PARAM_INVALID, with the position, when malformed. Nesting is limited, so that no text can exhaust the stack.
Result<JsonObjectInfo> CheckJsonObject(std::string_view text);

// OPTION_LOCAL_COMM_RES: empty, or an object of a known version.
Status CheckLocalCommRes(std::string_view text);

}  // namespace datadist

#endif  // DATADIST_ENGINE_JSON_CHECK_H_
