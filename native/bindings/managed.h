// What Python calls ManagedDataDist, and the arguments that only its methods take.
#ifndef DATADIST_BINDINGS_MANAGED_H_
#define DATADIST_BINDINGS_MANAGED_H_

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "arguments.h"
#include "calls.h"
#include "provider/extension.h"

namespace datadist::bindings {

struct ManagedDataDist : DataDist {
  Extension &extension() { return *provider->extension(); }
};

using ManagedClass = pybind11::class_<ManagedDataDist>;
void RegisterManagedCaches(ManagedClass &managed);
void RegisterManagedTransfers(ManagedClass &managed);

// (kind, id, model id)
using KeyArgument = std::tuple<uint8_t, uint64_t, uint64_t>;
using RefArgument = std::variant<int64_t, KeyArgument>;
using SpanArgument = std::optional<std::pair<int64_t, int64_t>>;

// LLM_PARAM_INVALID for a kind that does not exist.
Result<CacheKey> ToKey(const KeyArgument &key);
Result<CacheRef> ToRef(const RefArgument &ref);
Result<RowKeys> ToRowKeys(const std::vector<std::optional<KeyArgument>> &keys);

}  // namespace datadist::bindings

#endif  // DATADIST_BINDINGS_MANAGED_H_
