#include <pybind11/stl.h>

#include <chrono>
#include <string>
#include <utility>

#include "endpoint.h"
#include "managed.h"
#include "register.h"

namespace py = pybind11;

namespace datadist::bindings {
namespace {

using llm_datadist::LlmRole;
// (cluster id, rank, ip, port)
using MemberArgument = std::tuple<uint64_t, uint32_t, std::string, uint16_t>;

ManagedDataDist ConstructManaged(uint64_t cluster_id, int32_t role) {
  ManagedDataDist managed{{cluster_id, "engine", MakeExtendedProvider(cluster_id, static_cast<LlmRole>(role))}};
  FinalizeAtExit(managed.provider);
  return managed;
}

std::pair<llm_datadist::Status, int64_t> LinkComm(ManagedDataDist &self, const std::string &name,
                                                  const std::vector<MemberArgument> &arguments, uint32_t total_time_s) {
  std::vector<Extension::Member> members;
  for (const auto &[cluster_id, rank, ip, port] : arguments) {
    members.push_back({cluster_id, rank, ip, port});
  }
  const std::chrono::seconds total_time(total_time_s);
  return ReportResult(WithoutGil([&] { return self.extension().LinkComm(name, members, total_time); }), int64_t{-1});
}

llm_datadist::Status UnlinkComm(ManagedDataDist &self, int64_t comm_id) {
  return Report(WithoutGil([&] { return self.extension().UnlinkComm(comm_id); }));
}

std::tuple<llm_datadist::Status, int32_t, std::string> QueryComm(ManagedDataDist &self, int64_t comm_id) {
  const auto report = WithoutGil([&] { return self.extension().QueryComm(comm_id); });
  if (!report.ok()) {
    return {Report(report.status()), static_cast<int32_t>(CommState::kFailed), ""};
  }
  return {Report(Status::Ok()), static_cast<int32_t>(report.value().state), report.value().reason};
}

bool HasLinks(ManagedDataDist &self) {
  return ReportResult(WithoutGil([&] { return self.extension().HasLinks(); }), false).second;
}

void RegisterConstants(py::module_ &module) {
  module.attr("CACHE_CONTIGUOUS") = static_cast<int>(CacheLayout::kContiguous);
  module.attr("CACHE_BLOCKS") = static_cast<int>(CacheLayout::kBlocks);
  module.attr("KEY_REQUEST") = static_cast<int>(KeyKind::kRequest);
  module.attr("KEY_PREFIX") = static_cast<int>(KeyKind::kPrefix);
  module.attr("KEY_BLOCKS") = static_cast<int>(KeyKind::kBlocks);
  module.attr("COMM_OK") = static_cast<int>(CommState::kOk);
  module.attr("COMM_PREPARING") = static_cast<int>(CommState::kPreparing);
  module.attr("COMM_FAILED") = static_cast<int>(CommState::kFailed);
}

}  // namespace

Result<CacheKey> ToKey(const KeyArgument &key) {
  const auto &[kind, id, model_id] = key;
  if (kind < static_cast<uint8_t>(KeyKind::kRequest) || kind > static_cast<uint8_t>(KeyKind::kBlocks)) {
    return Status(llm_datadist::LLM_PARAM_INVALID, "cache key of kind " + std::to_string(kind) + ", allowed: 1..3");
  }
  return CacheKey{static_cast<KeyKind>(kind), id, model_id};
}

Result<CacheRef> ToRef(const RefArgument &ref) {
  if (const auto *cache_id = std::get_if<int64_t>(&ref)) {
    return CacheRef::Id(*cache_id);
  }
  const Result<CacheKey> key = ToKey(std::get<KeyArgument>(ref));
  return key.ok() ? Result<CacheRef>(CacheRef::Key(key.value())) : Result<CacheRef>(key.status());
}

Result<RowKeys> ToRowKeys(const std::vector<std::optional<KeyArgument>> &keys) {
  RowKeys converted;
  for (const auto &argument : keys) {
    converted.emplace_back();
    if (argument.has_value()) {
      const Result<CacheKey> key = ToKey(*argument);
      if (!key.ok()) {
        return key.status();
      }
      converted.back() = key.value();
    }
  }
  return converted;
}

void RegisterManaged(py::module_ &module) {
  RegisterConstants(module);
  // The engine may have to wait for its threads when the last reference goes.
  ManagedClass managed(module, "ManagedDataDist", py::release_gil_before_calling_cpp_dtor());
  managed.def(py::init(&ConstructManaged), py::arg("cluster_id"), py::arg("role"))
      .def("link_comm", &LinkComm, py::arg("name"), py::arg("members"), py::arg("total_time_s") = 120)
      .def("unlink_comm", &UnlinkComm, py::arg("comm_id"))
      .def("query_comm", &QueryComm, py::arg("comm_id"))
      .def("has_links", &HasLinks);
  DefineEndpoint(managed, module.attr("LinkReport"));
  RegisterManagedCaches(managed);
  RegisterManagedTransfers(managed);
}

}  // namespace datadist::bindings
