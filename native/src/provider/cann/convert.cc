#include "provider/cann/convert.h"

#include <sys/socket.h>

#include <string>

#include "control/address.h"

namespace datadist::cann {
namespace {

Result<std::vector<IpInfo>> ToIps(const StringCalls &strings, const std::vector<llm_datadist::IpInfo> &infos) {
  std::vector<IpInfo> ips;
  ips.reserve(infos.size());
  for (const llm_datadist::IpInfo &info : infos) {
    const std::string ip(info.ip.GetString(), info.ip.GetLength());
    const Result<SocketAddress> address = SocketAddress::FromIp(ip, info.port);
    if (!address.ok()) {
      return address.status();
    }
    if (address.value().family() != AF_INET) {
      return Invalid("ip is '" + ip + "': CANN links to IPv4 addresses only");
    }
    ips.push_back({String(strings, ip), info.port, {}});
  }
  return ips;
}

}  // namespace

OptionMap ToCann(const StringCalls &strings, const Options &options) {
  OptionMap map(StringLess{strings.less});
  for (const auto &[key, value] : options) {
    map.emplace(String(strings, key), String(strings, value));
  }
  return map;
}

Result<std::vector<ClusterInfo>> ToCann(const StringCalls &strings,
                                        const std::vector<llm_datadist::ClusterInfo> &clusters) {
  std::vector<ClusterInfo> infos;
  infos.reserve(clusters.size());
  for (const llm_datadist::ClusterInfo &cluster : clusters) {
    Result<std::vector<IpInfo>> local = ToIps(strings, cluster.local_ip_infos);
    Result<std::vector<IpInfo>> remote = ToIps(strings, cluster.remote_ip_infos);
    if (!local.ok() || !remote.ok()) {
      const Status &wrong = local.ok() ? remote.status() : local.status();
      return Status(wrong.code(), "cluster " + std::to_string(cluster.remote_cluster_id) + ": " + wrong.text());
    }
    ClusterInfo info;
    info.remote_cluster_id = cluster.remote_cluster_id;
    info.remote_role_type = cluster.remote_role_type;
    info.local_ip_infos = std::move(local).value();
    info.remote_ip_infos = std::move(remote).value();
    infos.push_back(std::move(info));
  }
  return infos;
}

CacheIndex ToCann(const llm_datadist::CacheIndex &index) {
  return {index.cluster_id, index.cache_id, index.batch_index, {}};
}

CacheDesc ToCann(const llm_datadist::CacheDesc &desc) {
  return {static_cast<uint32_t>(desc.placement), desc.num_tensors, static_cast<int32_t>(desc.data_type), desc.shape,
          {}};
}

Cache ToCann(const llm_datadist::Cache &cache) {
  return {cache.cache_id, {cache.tensor_addrs.begin(), cache.tensor_addrs.end()}, ToCann(cache.cache_desc), {}};
}

ExtParam ToCann(const llm_datadist::KvCacheExtParam &ext) {
  return {ext.src_layer_range, ext.dst_layer_range, ext.tensor_num_per_layer, {}};
}

}  // namespace datadist::cann
