// Which transports there are, and which of them a link takes.
#ifndef DATADIST_TRANSPORT_REGISTRY_H_
#define DATADIST_TRANSPORT_REGISTRY_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "base/worker_pool.h"
#include "transport/transport.h"

namespace datadist {

// What an endpoint has for its transports.
struct TransportHost {
  uint64_t cluster_id = 0;
  std::shared_ptr<RegionTable> regions;
  std::shared_ptr<WorkerPool> pool;
  std::chrono::milliseconds max_peer_hold{0};  // the longest that a peer's request may hold memory of ours
  uint16_t tcp_streams = 1;
};

struct TransportEntry {
  std::string name;  // on the wire, in OPTION_TRANSPORT and in reports
  std::function<std::unique_ptr<Transport>(const TransportHost &)> make;
};
// The preferred first; at most kMaxTransports.
using TransportList = std::vector<TransportEntry>;

// All that this engine has.
const TransportList &BuiltInTransports();

// How the transfers go that one end of a link initiates.
struct Route {
  std::string name;
  const Transport *transport = nullptr;
  TransportPeer peer;
  std::string reason;  // why nothing faster; empty when there is nothing faster
};

// Those of one endpoint.
class Transports {
 public:
  // `forced`: the only one that this end chooses; empty: whichever is best.
  Transports(const TransportList &list, const TransportHost &host, std::string forced);

  void Start();
  void Stop();

  std::vector<TransportOffer> Offers() const;
  // For the transfers that this end initiates to that cluster: the first that both have and that reaches the peer, or the forced one,
  // or LLM_LINK_FAILED. `process` is what the kernel says of the peer, null of one over TCP: only to it is memory given
  // or taken without the peer's help.
  Result<Route> Choose(uint64_t cluster_id, const std::vector<TransportOffer> &theirs,
                       const std::shared_ptr<const PeerProcess> &process) const;
  // What that cluster has chosen for those that it initiates. LLM_LINK_FAILED where one of us has no such transport, or it
  // takes our memory without our help and the kernel does not say whose hands it gets into.
  Result<Route> Admit(uint64_t cluster_id, const std::string &name, const std::vector<TransportOffer> &theirs,
                      const std::shared_ptr<const PeerProcess> &process) const;

 private:
  struct Named {
    std::string name;
    std::unique_ptr<Transport> transport;
  };
  bool MayChoose(const Named &named) const { return forced_.empty() || named.name == forced_; }

  std::vector<Named> transports_;
  const std::string forced_;
};

}  // namespace datadist

#endif  // DATADIST_TRANSPORT_REGISTRY_H_
