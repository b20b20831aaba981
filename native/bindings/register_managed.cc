#include <pybind11/stl.h>

#include <string>
#include <utility>

#include "arguments.h"
#include "managed.h"
#include "named_tuple.h"
#include "register.h"

namespace py = pybind11;

namespace datadist::bindings {
namespace {

using llm_datadist::LlmRole;
using StatusPerCluster = std::pair<llm_datadist::Status, std::vector<llm_datadist::Status>>;
// (cluster id, rank, ip, port)
using MemberArgument = std::tuple<uint64_t, uint32_t, std::string, uint16_t>;

OptionMap ToOptions(const Options &options) {
  OptionMap map;
  for (const auto &[key, value] : options) {
    map.emplace(ge::AscendString(key.data(), key.size()), ge::AscendString(value.data(), value.size()));
  }
  return map;
}

std::shared_ptr<ManagedDataDist> Construct(uint64_t cluster_id, int32_t role) {
  auto managed = std::make_shared<ManagedDataDist>(cluster_id, static_cast<LlmRole>(role));
  FinalizeAtExit(managed);
  return managed;
}

// The code of each cluster; the last failure is that of the call.
StatusPerCluster Deliver(const Result<std::vector<Status>> &results) {
  if (!results.ok()) {
    return {Report(results.status()), {}};
  }
  Status overall;
  std::vector<llm_datadist::Status> codes;
  for (const Status &status : results.value()) {
    codes.push_back(status.code());
    if (!status.ok()) {
      overall = status;
    }
  }
  return {Report(overall), std::move(codes)};
}

Engine::Clusters ToClusters(const std::vector<ClusterArgument> &clusters) {
  Engine::Clusters infos;
  for (const ClusterArgument &cluster : clusters) {
    infos.push_back(ToClusterInfo(cluster));
  }
  return infos;
}

StatusPerCluster Link(ManagedDataDist &self, const std::vector<ClusterArgument> &clusters, int32_t timeout_ms) {
  const Engine::Clusters infos = ToClusters(clusters);
  return Deliver(self.Call([&](Engine &engine) { return engine.LinkClusters(infos, timeout_ms); }));
}

StatusPerCluster Unlink(ManagedDataDist &self, const std::vector<ClusterArgument> &clusters, int32_t timeout_ms,
                        bool force) {
  const Engine::Clusters infos = ToClusters(clusters);
  return Deliver(self.Call([&](Engine &engine) { return engine.UnlinkClusters(infos, timeout_ms, force); }));
}

Result<std::vector<CommMember>> ToMembers(const std::vector<MemberArgument> &arguments) {
  std::vector<CommMember> members;
  for (const auto &[cluster_id, rank, ip, port] : arguments) {
    CommMember member{cluster_id, rank, std::nullopt};
    if (!ip.empty()) {
      const Result<SocketAddress> address = SocketAddress::FromIp(ip, port);
      if (!address.ok()) {
        return Status(address.status().code(), "rank " + std::to_string(rank) + ": " + address.status().text());
      }
      member.address = address.value();
    }
    members.push_back(member);
  }
  return members;
}

std::pair<llm_datadist::Status, int64_t> LinkComm(ManagedDataDist &self, const std::string &name,
                                                  const std::vector<MemberArgument> &arguments, uint32_t total_time_s) {
  const auto id = self.Call([&](Engine &engine) -> Result<int64_t> {
    const Result<std::vector<CommMember>> members = ToMembers(arguments);
    if (!members.ok()) {
      return members.status();
    }
    const Result<CommTable *> comms = engine.Comms();
    return comms.ok() ? comms.value()->Link(name, members.value(), std::chrono::seconds(total_time_s))
                      : Result<int64_t>(comms.status());
  });
  return ReportResult(id, int64_t{-1});
}

llm_datadist::Status UnlinkComm(ManagedDataDist &self, int64_t comm_id) {
  return Report(self.Call([&](Engine &engine) -> Status {
    const Result<CommTable *> comms = engine.Comms();
    return comms.ok() ? comms.value()->Unlink(comm_id) : comms.status();
  }));
}

std::tuple<llm_datadist::Status, int32_t, std::string> QueryComm(ManagedDataDist &self, int64_t comm_id) {
  const auto report = self.Call([&](Engine &engine) -> Result<CommTable::Report> {
    const Result<CommTable *> comms = engine.Comms();
    return comms.ok() ? comms.value()->Query(comm_id) : Result<CommTable::Report>(comms.status());
  });
  if (!report.ok()) {
    return {Report(report.status()), static_cast<int32_t>(CommState::kFailed), ""};
  }
  return {Report(Status::Ok()), static_cast<int32_t>(report.value().state), report.value().reason};
}

py::tuple QueryLink(ManagedDataDist &self, uint64_t cluster_id, const py::object &link_report) {
  const auto found = self.Call([&](Engine &engine) { return engine.QueryLink(cluster_id); });
  if (!found.ok()) {
    return py::make_tuple(Report(found.status()), py::none());
  }
  return py::make_tuple(Report(Status::Ok()), ToLinkReport(link_report, found.value()));
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
  const py::object link_report = module.attr("LinkReport");
  // The engine may have to wait for its threads when the last reference goes.
  ManagedClass managed(module, "ManagedDataDist", py::release_gil_before_calling_cpp_dtor());
  managed.def(py::init(&Construct), py::arg("cluster_id"), py::arg("role"))
      .def_property_readonly("cluster_id", &ManagedDataDist::cluster_id)
      .def(
          "initialize",
          [](ManagedDataDist &self, const Options &options) {
            return Report(WithoutGil([&] { return self.Initialize(ToOptions(options)); }));
          },
          py::arg("options"))
      .def("finalize",
           [](ManagedDataDist &self) {
             Report(WithoutGil([&] {
               self.Finalize();
               return Status::Ok();
             }));
           })
      .def(
          "set_role",
          [](ManagedDataDist &self, int32_t role, const Options &options) {
            return Report(self.Call(
                [&](Engine &engine) { return engine.SetRole(static_cast<LlmRole>(role), ToOptions(options)); }));
          },
          py::arg("role"), py::arg("options") = Options())
      .def("link_clusters", &Link, py::arg("clusters"), py::arg("timeout_ms") = 1000)
      .def("unlink_clusters", &Unlink, py::arg("clusters"), py::arg("timeout_ms") = 1000, py::arg("force") = false)
      .def("link_comm", &LinkComm, py::arg("name"), py::arg("members"), py::arg("total_time_s") = 120)
      .def("unlink_comm", &UnlinkComm, py::arg("comm_id"))
      .def("query_comm", &QueryComm, py::arg("comm_id"))
      .def("has_links",
           [](ManagedDataDist &self) {
             return ReportResult(self.Call([](Engine &engine) { return Result<bool>(engine.HasLinks()); }), false)
                 .second;
           })
      .def("listen_port",
           [](ManagedDataDist &self) {
             return ReportResult(self.Call([](Engine &engine) { return engine.ListenPort(); }), uint16_t{0});
           })
      .def(
          "query_link",
          [link_report](ManagedDataDist &self, uint64_t cluster_id) {
            return QueryLink(self, cluster_id, link_report);
          },
          py::arg("cluster_id"));
  RegisterManagedCaches(managed);
  RegisterManagedTransfers(managed);
}

}  // namespace datadist::bindings
