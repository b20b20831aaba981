// Link and unlink calls: their checks, and one status per cluster.
#include <algorithm>
#include <functional>
#include <system_error>
#include <thread>
#include <utility>

#include "engine/engine.h"
#include "link/client_handshake.h"

namespace datadist {
namespace {

using llm_datadist::ClusterInfo;
using llm_datadist::IpInfo;
using llm_datadist::LLM_FEATURE_NOT_ENABLED;
using llm_datadist::LLM_NOT_YET_LINK;
using llm_datadist::LLM_PARAM_INVALID;

constexpr size_t kMaxParallelClusters = 16;

Result<SocketAddress> ToAddress(const IpInfo &info) {
  return SocketAddress::FromIp(std::string_view(info.ip.GetString(), info.ip.GetLength()), info.port);
}

Status CheckIps(const char *field, size_t cluster, const std::vector<IpInfo> &infos) {
  for (size_t i = 0; i < infos.size(); ++i) {
    const Result<SocketAddress> address = ToAddress(infos[i]);
    if (!address.ok()) {
      return Status(LLM_PARAM_INVALID, "clusters[" + std::to_string(cluster) + "]." + field + "[" + std::to_string(i) +
                                           "]: " + address.status().text());
    }
  }
  return Status::Ok();
}

Status CheckClusters(const Engine::Clusters &clusters, int32_t timeout_ms) {
  if (timeout_ms <= 0) {
    return Status(LLM_PARAM_INVALID, "timeout_in_millis: " + std::to_string(timeout_ms) + ", allowed: above 0");
  }
  for (size_t i = 0; i < clusters.size(); ++i) {
    for (const Status &status : {CheckIps("remote_ip_infos", i, clusters[i].remote_ip_infos),
                                 CheckIps("local_ip_infos", i, clusters[i].local_ip_infos)}) {
      if (!status.ok()) {
        return status;
      }
    }
  }
  return clusters.empty() ? Status(LLM_PARAM_INVALID, "clusters: empty") : Status::Ok();
}

Status CheckOneIp(const char *field, const std::vector<IpInfo> &infos) {
  if (infos.size() != 1) {
    return Status(LLM_PARAM_INVALID, std::string(field) + ": " + std::to_string(infos.size()) + " entries, allowed: 1");
  }
  return Status::Ok();
}

Status OfCluster(size_t index, const ClusterInfo &cluster, const Status &status) {
  return status.ok() ? status
                     : Status(status.code(), "clusters[" + std::to_string(index) + "] (remote_cluster_id " +
                                                 std::to_string(cluster.remote_cluster_id) + "): " + status.text());
}

// act(cluster) for each, several at a time: one cluster that does not answer must not delay the others.
std::vector<Status> ForEachCluster(const Engine::Clusters &clusters,
                                   const std::function<Status(const ClusterInfo &)> &act) {
  std::vector<Status> results(clusters.size());
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next.fetch_add(1); i < clusters.size(); i = next.fetch_add(1)) {
      try {
        results[i] = OfCluster(i, clusters[i], act(clusters[i]));
      } catch (const std::exception &error) {
        results[i] = Status(llm_datadist::LLM_FAILED, error.what());
      }
    }
  };
  std::vector<std::thread> helpers;
  try {
    while (helpers.size() + 1 < std::min(clusters.size(), kMaxParallelClusters)) {
      helpers.emplace_back(work);
    }
  } catch (const std::system_error &) {
    // As many as there are, down to this thread alone.
  }
  work();
  for (std::thread &helper : helpers) {
    helper.join();
  }
  return results;
}

}  // namespace

Result<std::vector<Status>> Engine::LinkClusters(const Clusters &clusters, int32_t timeout_ms) {
  if (Status status = CheckClusters(clusters, timeout_ms); !status.ok()) {
    return status;
  }
  return ForEachCluster(clusters, [&](const ClusterInfo &cluster) {
    const Deadline deadline = Deadline::In(std::chrono::milliseconds(timeout_ms));
    return statistics_->Count(Statistics::Call::kLink, [&] { return LinkOne(cluster, deadline); });
  });
}

Status Engine::LinkOne(const ClusterInfo &cluster, Deadline deadline) {
  if (Status status = CheckOneIp("remote_ip_infos", cluster.remote_ip_infos); !status.ok()) {
    return status;
  }
  if (!comm_res_known_.load()) {
    if (Status status = CheckOneIp("local_ip_infos", cluster.local_ip_infos); !status.ok()) {
      return Status(status.code(), status.text() + " (without " + llm_datadist::OPTION_LOCAL_COMM_RES + " and " +
                                       llm_datadist::OPTION_LISTEN_IP_INFO + " the first link must say it)");
    }
    comm_res_known_.store(true);
  }
  if (!endpoint_->options().local_comm_res.ok()) {
    return endpoint_->options().local_comm_res;
  }
  const Result<SocketAddress> address = ToAddress(cluster.remote_ip_infos[0]);
  if (!address.ok()) {
    return address.status();
  }
  return DialLink(endpoint_, table_, DialTarget{address.value(), cluster.remote_cluster_id, ""}, deadline);
}

Result<std::vector<Status>> Engine::UnlinkClusters(const Clusters &clusters, int32_t timeout_ms, bool force) {
  if (Status status = CheckClusters(clusters, timeout_ms); !status.ok()) {
    return status;
  }
  return ForEachCluster(clusters, [&](const ClusterInfo &cluster) {
    const Deadline deadline = Deadline::In(std::chrono::milliseconds(timeout_ms));
    return statistics_->Count(Statistics::Call::kUnlink, [&] { return UnlinkOne(cluster, deadline, force); });
  });
}

Status Engine::UnlinkOne(const ClusterInfo &cluster, Deadline deadline, bool force) {
  if (!force) {
    if (Status status = CheckOneIp("remote_ip_infos", cluster.remote_ip_infos); !status.ok()) {
      return status;
    }
  }
  SocketAddress address;
  std::string address_text;
  if (cluster.remote_ip_infos.size() == 1) {
    const Result<SocketAddress> parsed = ToAddress(cluster.remote_ip_infos[0]);
    if (!parsed.ok()) {
      return parsed.status();
    }
    address = parsed.value();
    address_text = address.ToString();
  }
  const std::shared_ptr<Link> link = table_->FindForUnlink(cluster.remote_cluster_id, address_text);
  if (link == nullptr) {
    return Status::Ok();
  }
  if (force) {
    table_->Remove(link.get());
    link->CloseWhenIdle(deadline, "unlinked by force");
    link->WaitUntilServed();
    return Status::Ok();
  }
  const Status status = link->alive() ? link->Unlink(deadline)
                                      : UnlinkByDialling(*endpoint_, address, link->token(), deadline);
  if (status.ok()) {
    table_->Remove(link.get());
    link->Close("unlinked");
    link->WaitUntilServed();
  }
  return status;
}

Result<CommTable *> Engine::Comms() {
  if (endpoint_->options().hixl_backend) {
    return Status(LLM_FEATURE_NOT_ENABLED, std::string("bilateral links with ") +
                                               llm_datadist::OPTION_TRANSFER_BACKEND + " 'hixl'");
  }
  return &comms_;
}

Result<std::shared_ptr<Link>> Engine::FindLink(uint64_t cluster_id) const {
  std::shared_ptr<Link> link = table_->Find(cluster_id);
  if (link == nullptr) {
    return Status(LLM_NOT_YET_LINK, "no link to cluster " + std::to_string(cluster_id));
  }
  if (Status status = comms_.CheckReady(cluster_id); !status.ok()) {
    return status;
  }
  return link;
}

Result<llm_datadist::LinkReport> Engine::QueryLink(uint64_t cluster_id) const {
  const Result<std::shared_ptr<Link>> link = FindLink(cluster_id);
  if (!link.ok()) {
    return link.status();
  }
  return link.value()->Report();
}

}  // namespace datadist
