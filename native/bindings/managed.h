// What Python calls ManagedDataDist, and the arguments that only its methods take.
#ifndef DATADIST_BINDINGS_MANAGED_H_
#define DATADIST_BINDINGS_MANAGED_H_

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "calls.h"
#include "engine/engine_holder.h"

namespace datadist::bindings {

class ManagedDataDist {
 public:
  ManagedDataDist(uint64_t cluster_id, llm_datadist::LlmRole role) : holder_(cluster_id, role, EngineApi::kPython) {}

  uint64_t cluster_id() const { return holder_.cluster_id(); }
  Status Initialize(const OptionMap &options) { return holder_.Start(options); }
  void Finalize() { [[maybe_unused]] const Status status = holder_.Stop(); }

  // act(engine) without the GIL.
  template <typename Act>
  auto Call(const Act &act) {
    return WithoutGil([&] { return holder_.With(act); });
  }

 private:
  EngineHolder holder_;
};

using ManagedClass = pybind11::class_<ManagedDataDist, std::shared_ptr<ManagedDataDist>>;
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

// (code, value), the value being `otherwise` on failure; the reason is kept for last_error().
template <typename T>
std::pair<llm_datadist::Status, T> ReportResult(const Result<T> &result, T otherwise) {
  return {Report(result.ok() ? Status::Ok() : result.status()), result.ok() ? result.value() : std::move(otherwise)};
}

}  // namespace datadist::bindings

#endif  // DATADIST_BINDINGS_MANAGED_H_
