// The methods that LlmDataDist and ManagedDataDist have in common, all over the Provider.
#ifndef DATADIST_BINDINGS_ENDPOINT_H_
#define DATADIST_BINDINGS_ENDPOINT_H_

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "arguments.h"
#include "calls.h"

namespace datadist::bindings {

// (code, value), the value being `otherwise` on failure; the reason is kept for last_error().
template <typename T>
std::pair<llm_datadist::Status, T> ReportResult(const Result<T> &result, T otherwise) {
  return {Report(result.ok() ? Status::Ok() : result.status()), result.ok() ? result.value() : std::move(otherwise)};
}

using StatusPerCluster = std::pair<llm_datadist::Status, std::vector<llm_datadist::Status>>;
StatusPerCluster Link(DataDist &self, const std::vector<ClusterArgument> &clusters, int32_t timeout_ms);
StatusPerCluster Unlink(DataDist &self, const std::vector<ClusterArgument> &clusters, int32_t timeout_ms, bool force);
pybind11::tuple QueryLink(DataDist &self, uint64_t cluster_id, const pybind11::object &link_report);

template <typename Endpoint>
void DefineEndpoint(pybind11::class_<Endpoint> &endpoint, const pybind11::object &link_report) {
  namespace py = pybind11;
  endpoint.def_property_readonly("cluster_id", [](const Endpoint &self) { return self.cluster_id; })
      .def(
          "initialize",
          [](Endpoint &self, const Options &options) {
            return Report(WithoutGil([&] { return self.provider->Initialize(options); }));
          },
          py::arg("options"))
      .def("finalize",
           [](Endpoint &self) {
             Report(WithoutGil([&] {
               self.provider->Finalize();
               return Status::Ok();
             }));
           })
      .def(
          "set_role",
          [](Endpoint &self, int32_t role, const Options &options) {
            const auto wanted = static_cast<llm_datadist::LlmRole>(role);
            return Report(WithoutGil([&] { return self.provider->SetRole(wanted, options); }));
          },
          py::arg("role"), py::arg("options") = Options())
      .def(
          "link_clusters",
          [](Endpoint &self, const std::vector<ClusterArgument> &clusters, int32_t timeout_ms) {
            return Link(self, clusters, timeout_ms);
          },
          py::arg("clusters"), py::arg("timeout_ms") = 1000)
      .def(
          "unlink_clusters",
          [](Endpoint &self, const std::vector<ClusterArgument> &clusters, int32_t timeout_ms, bool force) {
            return Unlink(self, clusters, timeout_ms, force);
          },
          py::arg("clusters"), py::arg("timeout_ms") = 1000, py::arg("force") = false)
      .def("listen_port",
           [](Endpoint &self) {
             return ReportResult(WithoutGil([&] { return self.provider->ListenPort(); }), uint16_t{0});
           })
      .def(
          "query_link",
          [link_report](Endpoint &self, uint64_t cluster_id) { return QueryLink(self, cluster_id, link_report); },
          py::arg("cluster_id"));
}

}  // namespace datadist::bindings

#endif  // DATADIST_BINDINGS_ENDPOINT_H_
