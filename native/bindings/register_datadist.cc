#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "block_ids.h"
#include "calls.h"
#include "endpoint.h"
#include "memory/huge_pages.h"
#include "memory/region_table.h"
#include "named_tuple.h"
#include "register.h"

namespace py = pybind11;

namespace datadist::bindings {
namespace {

using llm_datadist::LlmRole;

constexpr LayerRange kAllLayers = {-1, -1};
constexpr uint8_t kKeyAndValue = 2;

DataDist ConstructDataDist(uint64_t cluster_id, int32_t role, const std::string &provider_name) {
  auto made = MakeProvider(provider_name, cluster_id, static_cast<LlmRole>(role));
  if (!made.ok()) {
    throw py::value_error(made.status().text());
  }
  DataDist datadist{cluster_id, provider_name, std::move(made).value()};
  FinalizeAtExit(datadist.provider);
  return datadist;
}

std::vector<llm_datadist::ClusterInfo> ToClusterInfos(const std::vector<ClusterArgument> &clusters) {
  std::vector<llm_datadist::ClusterInfo> infos;
  infos.reserve(clusters.size());
  for (const ClusterArgument &cluster : clusters) {
    infos.push_back(ToClusterInfo(cluster));
  }
  return infos;
}

std::pair<llm_datadist::Status, int64_t> RegisterKvCache(DataDist &self, const std::vector<int64_t> &shape,
                                                         int32_t data_type, const std::vector<uint64_t> &addrs,
                                                         uint32_t placement) {
  llm_datadist::CacheDesc desc{};
  desc.placement = static_cast<llm_datadist::CachePlacement>(placement);
  desc.num_tensors = static_cast<uint32_t>(addrs.size());
  desc.data_type = ToDataType(data_type);
  desc.shape = shape;
  const auto cache_id = WithoutGil([&] { return self.provider->RegisterKvCache(desc, addrs); });
  return ReportResult(cache_id, int64_t{-1});
}

llm_datadist::Status PullKvBlocks(DataDist &self, uint64_t src_cluster_id, int64_t src_cache_id, int64_t dst_cache_id,
                                  py::handle src_blocks, py::handle dst_blocks, LayerRange src_layers,
                                  LayerRange dst_layers, uint8_t tensor_num_per_layer) {
  auto transfer = MakeTransfer<BlocksTransfer>(src_cluster_id, src_cache_id, dst_cache_id, 0);
  transfer.ext = ToExtParam(src_layers, dst_layers, tensor_num_per_layer);
  const Status read = ReadBlocks(src_blocks, dst_blocks, transfer);
  return Report(read.ok() ? WithoutGil([&] { return self.provider->PullKvBlocks(transfer); }) : read);
}

llm_datadist::Status PushKvBlocks(DataDist &self, int64_t src_cache_id, uint64_t dst_cluster_id, int64_t dst_cache_id,
                                  py::handle src_blocks, py::handle dst_blocks, uint32_t num_tensors,
                                  LayerRange src_layers, LayerRange dst_layers, uint8_t tensor_num_per_layer) {
  auto transfer = MakeTransfer<BlocksTransfer>(dst_cluster_id, dst_cache_id, src_cache_id, num_tensors);
  transfer.ext = ToExtParam(src_layers, dst_layers, tensor_num_per_layer);
  const Status read = ReadBlocks(src_blocks, dst_blocks, transfer);
  return Report(read.ok() ? WithoutGil([&] { return self.provider->PushKvBlocks(transfer); }) : read);
}

llm_datadist::Status PullKvCache(DataDist &self, uint64_t src_cluster_id, int64_t src_cache_id,
                                 uint32_t src_batch_index, int64_t dst_cache_id, uint32_t dst_batch_index, int64_t size,
                                 LayerRange src_layers, LayerRange dst_layers, uint8_t tensor_num_per_layer) {
  auto transfer = MakeTransfer<CacheTransfer>(src_cluster_id, src_cache_id, dst_cache_id, 0);
  transfer.remote.batch_index = src_batch_index;
  transfer.local_batch_index = dst_batch_index;
  transfer.size = size;
  transfer.ext = ToExtParam(src_layers, dst_layers, tensor_num_per_layer);
  return Report(WithoutGil([&] { return self.provider->PullKvCache(transfer); }));
}

llm_datadist::Status PushKvCache(DataDist &self, int64_t src_cache_id, uint32_t src_batch_index,
                                 uint64_t dst_cluster_id, int64_t dst_cache_id, uint32_t dst_batch_index,
                                 uint32_t num_tensors, int64_t size, LayerRange src_layers, LayerRange dst_layers,
                                 uint8_t tensor_num_per_layer) {
  auto transfer = MakeTransfer<CacheTransfer>(dst_cluster_id, dst_cache_id, src_cache_id, num_tensors);
  transfer.remote.batch_index = dst_batch_index;
  transfer.local_batch_index = src_batch_index;
  transfer.size = size;
  transfer.ext = ToExtParam(src_layers, dst_layers, tensor_num_per_layer);
  return Report(WithoutGil([&] { return self.provider->PushKvCache(transfer); }));
}

std::pair<llm_datadist::Status, int64_t> TensorBytes(const std::vector<int64_t> &shape, int32_t data_type) {
  llm_datadist::CacheDesc desc{};
  desc.data_type = ToDataType(data_type);
  desc.shape = shape;
  const Result<CacheGeometry> geometry = ComputeGeometry(desc);
  return {Report(geometry.ok() ? Status::Ok() : geometry.status()),
          geometry.ok() ? static_cast<int64_t>(geometry.value().tensor_bytes) : -1};
}

void RegisterClusterInfo(py::module_ &module) {
  py::class_<ClusterArgument>(module, "ClusterInfo")
      .def(py::init([](uint64_t remote_cluster_id, const py::object &remote_ip_infos, const py::object &local_ip_infos,
                       int32_t remote_role_type) {
             ClusterArgument cluster{remote_cluster_id, py::list(remote_ip_infos), py::list(local_ip_infos),
                                     remote_role_type};
             ToClusterInfo(cluster);  // a wrong element is reported where it was written
             return cluster;
           }),
           py::arg("remote_cluster_id") = 0, py::arg("remote_ip_infos") = py::tuple(),
           py::arg("local_ip_infos") = py::tuple(), py::arg("remote_role_type") = 0)
      .def_readwrite("remote_cluster_id", &ClusterArgument::remote_cluster_id)
      .def_readwrite("remote_role_type", &ClusterArgument::remote_role_type)
      .def_readwrite("local_ip_infos", &ClusterArgument::local_ip_infos)
      .def_readwrite("remote_ip_infos", &ClusterArgument::remote_ip_infos);
}

py::object DefineCapabilities(py::module_ &module) {
  return DefineNamedTuple(module, "Capabilities",
                          {{"engine_options", "bool"},
                           {"reports_port", "bool"},
                           {"reports_links", "bool"},
                           {"ipv6", "bool"},
                           {"host_memory", "bool"},
                           {"device_memory", "bool"},
                           {"register_before_link", "bool"},
                           {"writes_end_with_call", "bool"},
                           {"grants_writes", "bool"},
                           {"peer_drops_half", "bool"},
                           {"crossing_links", "bool"},
                           {"both_listen", "bool"},
                           {"max_addrs_per_cache", "int"},
                           {"max_regions", "int"},
                           {"max_links", "int"},
                           {"min_run_bytes", "int"},
                           {"min_link_timeout_ms", "int"}});
}

py::object ToTuple(const py::object &capabilities, const Capabilities &c) {
  return capabilities(c.engine_options, c.reports_port, c.reports_links, c.ipv6, c.host_memory, c.device_memory,
                      c.register_before_link, c.writes_end_with_call, c.grants_writes, c.peer_drops_half,
                      c.crossing_links, c.both_listen, c.max_addrs_per_cache, c.max_regions, c.max_links,
                      c.min_run_bytes, c.min_link_timeout_ms);
}

std::pair<llm_datadist::Status, uint64_t> GrantWrites(DataDist &self, uint64_t cluster_id,
                                                      const std::vector<std::pair<int64_t, py::object>> &blocks) {
  std::vector<llm_datadist::WritableBlocks> writable;
  for (const auto &[cache_id, ids] : blocks) {
    Result<std::vector<uint64_t>> read = ReadBlockIds(ids, "blocks");
    if (!read.ok()) {
      return {Report(read.status()), 0};
    }
    writable.push_back({cache_id, std::move(read).value()});
  }
  return ReportResult(WithoutGil([&] { return self.provider->GrantWrites(cluster_id, writable); }), uint64_t{0});
}

void RegisterTransfers(py::class_<DataDist> &datadist) {
  const auto src_layers = py::arg("src_layer_range") = kAllLayers;
  const auto dst_layers = py::arg("dst_layer_range") = kAllLayers;
  const auto per_layer = py::arg("tensor_num_per_layer") = kKeyAndValue;
  datadist
      .def("pull_kv_blocks", &PullKvBlocks, py::arg("src_cluster_id"), py::arg("src_cache_id"), py::arg("dst_cache_id"),
           py::arg("src_blocks"), py::arg("dst_blocks"), src_layers, dst_layers, per_layer)
      .def("push_kv_blocks", &PushKvBlocks, py::arg("src_cache_id"), py::arg("dst_cluster_id"), py::arg("dst_cache_id"),
           py::arg("src_blocks"), py::arg("dst_blocks"), py::arg("num_tensors"), src_layers, dst_layers, per_layer)
      .def("pull_kv_cache", &PullKvCache, py::arg("src_cluster_id"), py::arg("src_cache_id"),
           py::arg("src_batch_index"), py::arg("dst_cache_id"), py::arg("dst_batch_index") = 0, py::arg("size") = -1,
           src_layers, dst_layers, per_layer)
      .def("push_kv_cache", &PushKvCache, py::arg("src_cache_id"), py::arg("src_batch_index"),
           py::arg("dst_cluster_id"), py::arg("dst_cache_id"), py::arg("dst_batch_index"), py::arg("num_tensors"),
           py::arg("size") = -1, src_layers, dst_layers, per_layer)
      .def("grant_writes", &GrantWrites, py::arg("cluster_id"), py::arg("blocks"))
      .def(
          "revoke_writes",
          [](DataDist &self, uint64_t grant_id) {
            return Report(WithoutGil([&] { return self.provider->RevokeWrites(grant_id); }));
          },
          py::arg("grant_id"));
}

}  // namespace

StatusPerCluster Link(DataDist &self, const std::vector<ClusterArgument> &clusters, int32_t timeout_ms) {
  const auto infos = ToClusterInfos(clusters);
  std::vector<llm_datadist::Status> rets;
  const Status status = WithoutGil([&] { return self.provider->Link(infos, rets, timeout_ms); });
  return {Report(status), std::move(rets)};
}

StatusPerCluster Unlink(DataDist &self, const std::vector<ClusterArgument> &clusters, int32_t timeout_ms, bool force) {
  const auto infos = ToClusterInfos(clusters);
  std::vector<llm_datadist::Status> rets;
  const Status status = WithoutGil([&] { return self.provider->Unlink(infos, rets, timeout_ms, force); });
  return {Report(status), std::move(rets)};
}

py::tuple QueryLink(DataDist &self, uint64_t cluster_id, const py::object &link_report) {
  const auto found = WithoutGil([&] { return self.provider->QueryLink(cluster_id); });
  if (!found.ok()) {
    return py::make_tuple(Report(found.status()), py::none());
  }
  return py::make_tuple(Report(Status::Ok()), ToLinkReport(link_report, found.value()));
}

void RegisterDataDist(py::module_ &module) {
  module.def("providers", &ProviderNames);
  module.def("tensor_bytes", &TensorBytes, py::arg("shape"), py::arg("data_type"));
  module.def(
      "advise_huge_pages",
      [](uint64_t address, uint64_t length) {
        return HugePagesAllowed() && AdviseHugePages({address, address + length});
      },
      py::arg("address"), py::arg("length"));
  RegisterClusterInfo(module);
  const py::object huge_pages_report = DefineNamedTuple(
      module, "HugePagesReport", {{"allowed", "bool"}, {"bytes", "int"}, {"huge_bytes", "int"}, {"seconds", "float"}});
  const py::object link_report = DefineNamedTuple(module, "LinkReport",
                                                  {{"alive", "bool"},
                                                   {"transport", "str"},
                                                   {"transport_reason", "str"},
                                                   {"peer", "str"},
                                                   {"bytes_pulled", "int"},
                                                   {"bytes_pushed", "int"},
                                                   {"blocks_verified", "int"},
                                                   {"blocks_wrong", "int"}});

  const py::object capabilities = DefineCapabilities(module);

  // The engine may have to wait for its threads when the last reference goes.
  py::class_<DataDist> datadist(module, "LlmDataDist", py::release_gil_before_calling_cpp_dtor());
  datadist
      .def(py::init(&ConstructDataDist), py::arg("cluster_id"), py::arg("role"), py::arg("provider") = "engine")
      .def_readonly("provider", &DataDist::provider_name)
      .def_property_readonly(
          "capabilities",
          [capabilities](const DataDist &self) { return ToTuple(capabilities, self.provider->capabilities()); })
      .def("enter_thread", [](DataDist &self) { return Report(self.provider->EnterThread()); })
      .def("register_kv_cache", &RegisterKvCache, py::arg("shape"), py::arg("data_type"), py::arg("addrs"),
           py::arg("placement") = 1)
      .def(
          "unregister_kv_cache",
          [](DataDist &self, int64_t cache_id) {
            return Report(WithoutGil([&] { return self.provider->UnregisterKvCache(cache_id); }));
          },
          py::arg("cache_id"))
      .def("linked_clusters",
           [](DataDist &self) {
             return ReportResult(WithoutGil([&] { return self.provider->LinkedClusters(); }), std::vector<uint64_t>());
           })
      .def("wait_for_huge_pages", [huge_pages_report](DataDist &self) -> py::tuple {
        const auto waited = WithoutGil([&] { return self.provider->WaitForHugePages(); });
        if (!waited.ok()) {
          return py::make_tuple(Report(waited.status()), py::none());
        }
        const llm_datadist::HugePagesReport &report = waited.value();
        return py::make_tuple(Report(Status::Ok()),
                              huge_pages_report(report.allowed, report.bytes, report.huge_bytes, report.seconds));
      });
  DefineEndpoint(datadist, link_report);
  RegisterTransfers(datadist);
}

}  // namespace datadist::bindings
