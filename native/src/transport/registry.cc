#include "transport/registry.h"

#include <algorithm>
#include <utility>

#include "llm_datadist/llm_datadist_ext.h"
#include "transport/cma/cma_transport.h"
#include "transport/local/local_transport.h"
#include "transport/tcp/tcp_transport.h"

namespace datadist {
namespace {

using llm_datadist::LLM_LINK_FAILED;

// The route by the transport of that name, if the peer has it too.
Result<Route> RouteTo(uint64_t cluster_id, const std::string &name, const Transport &transport,
                      const std::vector<TransportOffer> &theirs, const std::shared_ptr<const PeerProcess> &process) {
  const auto offer = std::find_if(theirs.begin(), theirs.end(),
                                  [&](const TransportOffer &each) { return each.name == name; });
  if (offer == theirs.end()) {
    return Status(LLM_LINK_FAILED, "the peer does not offer it");
  }
  return Route{name, &transport, TransportPeer{offer->blob, process, cluster_id}, ""};
}

}  // namespace

const TransportList &BuiltInTransports() {
  // Never destroyed: an endpoint may be made by a static object.
  static const auto *list = new TransportList{
      {"local", MakeLocalTransport},
      {"cma", MakeCmaTransport},
      {"tcp", MakeTcpTransport},
  };
  return *list;
}

Transports::Transports(const TransportList &list, const TransportHost &host, std::string forced)
    : forced_(std::move(forced)) {
  for (const TransportEntry &entry : list) {
    transports_.push_back({entry.name, entry.make(host)});
  }
}

void Transports::Start() {
  for (const Named &named : transports_) {
    if (MayChoose(named)) {
      named.transport->Start();
    }
  }
}

void Transports::Stop() {
  for (const Named &named : transports_) {
    named.transport->Stop();
  }
}

std::vector<TransportOffer> Transports::Offers() const {
  std::vector<TransportOffer> offers;
  for (const Named &named : transports_) {
    offers.push_back({named.name, named.transport->Offer()});
  }
  return offers;
}

Result<Route> Transports::Choose(uint64_t cluster_id, const std::vector<TransportOffer> &theirs,
                                 const std::shared_ptr<const PeerProcess> &process) const {
  const std::string forced_text = std::string("forced by ") + llm_datadist::OPTION_TRANSPORT;
  std::string why_not;
  for (const Named &named : transports_) {
    if (!MayChoose(named)) {
      continue;
    }
    Result<Route> route = RouteTo(cluster_id, named.name, *named.transport, theirs, process);
    const Status reaches = route.ok() ? named.transport->Reaches(route.value().peer) : route.status();
    if (reaches.ok()) {
      route.value().reason = forced_.empty() ? why_not : forced_text;
      return route;
    }
    if (!forced_.empty()) {
      return Status(LLM_LINK_FAILED,
                    forced_text + ": transport " + forced_ + " cannot reach the peer: " + reaches.text());
    }
    if (!route.ok() || named.transport->Expected(route.value().peer)) {
      why_not += (why_not.empty() ? "" : "; ") + named.name + ": " + reaches.text();
    }
  }
  return Status(LLM_LINK_FAILED, "no transport reaches the peer" + (why_not.empty() ? "" : ": " + why_not));
}

Result<Route> Transports::Admit(uint64_t cluster_id, const std::string &name,
                                const std::vector<TransportOffer> &theirs,
                                const std::shared_ptr<const PeerProcess> &process) const {
  const auto refuse = [&](const std::string &why) {
    return Status(LLM_LINK_FAILED, "transport " + name + why);
  };
  std::string ours;
  for (const Named &named : transports_) {
    ours += (ours.empty() ? "" : ", ") + named.name;
    if (named.name != name) {
      continue;
    }
    Result<Route> route = RouteTo(cluster_id, name, *named.transport, theirs, process);
    if (!route.ok()) {
      return refuse(": " + route.status().text());
    }
    const Status admitted = named.transport->Admits(route.value().peer);
    return admitted.ok() ? route : refuse(" " + admitted.text());
  }
  return refuse(" is none that this end offers (" + ours + ")");
}

}  // namespace datadist
