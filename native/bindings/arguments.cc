#include "arguments.h"

#include <pybind11/stl.h>

#include <vector>

#include "block_ids.h"

namespace py = pybind11;

namespace datadist::bindings {
namespace {

std::vector<llm_datadist::IpInfo> ToIpInfos(const py::list &pairs, const char *field) {
  std::vector<llm_datadist::IpInfo> infos;
  try {
    for (const auto &[ip, port] : pairs.cast<std::vector<std::pair<std::string, uint16_t>>>()) {
      llm_datadist::IpInfo info{};
      info.ip = ge::AscendString(ip.data(), ip.size());
      info.port = port;
      infos.push_back(info);
    }
  } catch (const py::cast_error &) {
    throw py::type_error(std::string(field) + " is " + py::repr(pairs).cast<std::string>() +
                         "; allowed: a list of (str, port 0..65535)");
  }
  return infos;
}

}  // namespace

llm_datadist::ClusterInfo ToClusterInfo(const ClusterArgument &cluster) {
  llm_datadist::ClusterInfo info{};
  info.remote_cluster_id = cluster.remote_cluster_id;
  info.remote_role_type = cluster.remote_role_type;
  info.local_ip_infos = ToIpInfos(cluster.local_ip_infos, "local_ip_infos");
  info.remote_ip_infos = ToIpInfos(cluster.remote_ip_infos, "remote_ip_infos");
  return info;
}

llm_datadist::DataType ToDataType(int32_t data_type) {
  const bool known = data_type >= 0 && data_type <= static_cast<int32_t>(ge::DT_FLOAT4_E1M2);
  return known ? static_cast<ge::DataType>(data_type) : ge::DT_UNDEFINED;
}

py::object ToLinkReport(const py::object &link_report_class, const llm_datadist::LinkReport &report) {
  return link_report_class(report.alive, report.transport, report.transport_reason, report.peer, report.bytes_pulled,
                           report.bytes_pushed, report.blocks_verified, report.blocks_wrong);
}

llm_datadist::KvCacheExtParam ToExtParam(LayerRange src_layer_range, LayerRange dst_layer_range,
                                         uint8_t tensor_num_per_layer) {
  llm_datadist::KvCacheExtParam ext{};
  ext.src_layer_range = src_layer_range;
  ext.dst_layer_range = dst_layer_range;
  ext.tensor_num_per_layer = tensor_num_per_layer;
  return ext;
}

Status ReadBlocks(py::handle src_blocks, py::handle dst_blocks, BlocksTransfer &transfer) {
  Result<BlockLists> lists = ReadBlockLists(src_blocks, dst_blocks);
  if (!lists.ok()) {
    return lists.status();
  }
  transfer.src_blocks = std::move(lists.value().src);
  transfer.dst_blocks = std::move(lists.value().dst);
  return Status::Ok();
}

}  // namespace datadist::bindings
