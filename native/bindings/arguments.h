// Python arguments of the transfers and links, turned into the structs of the public header. Shared by LlmDataDist and
// TransferQueue, whose methods take the same ones.
#ifndef DATADIST_BINDINGS_ARGUMENTS_H_
#define DATADIST_BINDINGS_ARGUMENTS_H_

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "base/status.h"
#include "provider/provider.h"

namespace datadist::bindings {

// What Python calls LlmDataDist.
struct DataDist {
  uint64_t cluster_id;
  std::string provider_name;
  std::shared_ptr<Provider> provider;
};

// What Python calls ClusterInfo. The lists stay Python's own, so that changing one in place has the effect it seems to
// have.
struct ClusterArgument {
  uint64_t remote_cluster_id;
  pybind11::list remote_ip_infos;
  pybind11::list local_ip_infos;
  int32_t remote_role_type;
};

// TypeError when a list holds anything but (str, port).
llm_datadist::ClusterInfo ToClusterInfo(const ClusterArgument &cluster);

// The enum holds no other number; the engine refuses DT_UNDEFINED as it would them.
llm_datadist::DataType ToDataType(int32_t data_type);

// An instance of the Python class LinkReport.
pybind11::object ToLinkReport(const pybind11::object &link_report_class, const llm_datadist::LinkReport &report);

using LayerRange = std::pair<int32_t, int32_t>;

llm_datadist::KvCacheExtParam ToExtParam(LayerRange src_layer_range, LayerRange dst_layer_range,
                                         uint8_t tensor_num_per_layer);

// The remote cache and the local one. `num_tensors` is what the caller says of the local cache, 0 where nobody asks.
template <typename Transfer>
Transfer MakeTransfer(uint64_t cluster_id, int64_t remote_cache_id, int64_t local_cache_id, uint32_t num_tensors) {
  Transfer transfer;
  transfer.remote.cluster_id = cluster_id;
  transfer.remote.cache_id = remote_cache_id;
  transfer.local.cache_id = local_cache_id;
  transfer.local.cache_desc.num_tensors = num_tensors;
  return transfer;
}

// Fills in both block lists; LLM_PARAM_INVALID for an index that no cache can have.
Status ReadBlocks(pybind11::handle src_blocks, pybind11::handle dst_blocks, BlocksTransfer &transfer);

}  // namespace datadist::bindings

#endif  // DATADIST_BINDINGS_ARGUMENTS_H_
