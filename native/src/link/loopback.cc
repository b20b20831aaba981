#include "link/loopback.h"

#include <sys/socket.h>

#include <cerrno>
#include <utility>
#include <vector>

#include "base/random.h"
#include "base/socket_io.h"

namespace datadist {
namespace {

using llm_datadist::LLM_LINK_FAILED;

Status ConnectPair(Fd &near, Fd &far) {
  int fds[2] = {-1, -1};
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) != 0) {
    return Status(LLM_LINK_FAILED, "socketpair: " + ErrnoText(errno));
  }
  near = Fd(fds[0]);
  far = Fd(fds[1]);
  return Status::Ok();
}

Status IntroduceHalves(const LocalEndpoint &endpoint, LinkParts &near, LinkParts &far) {
  const Result<LinkToken> token = RandomBytes();
  if (!token.ok()) {
    return token.status();
  }
  near.token = far.token = token.value();
  near.process = far.process = PeerProcess::Self();
  near.peer = far.peer = endpoint.Info();
  return Status::Ok();
}

Status Connect(const LocalEndpoint &endpoint, LinkParts &near, LinkParts &far) {
  Result<Route> route = endpoint.transports().Choose(near.peer.cluster_id, near.peer.transports, near.process);
  if (!route.ok()) {
    return route.status();
  }
  near.outgoing = far.incoming = std::move(route).value();
  // Nobody initiates from the far half: it is in no table, and gets no data connections.
  far.outgoing = near.incoming = near.outgoing;
  Fd near_control;
  Fd far_control;
  Status status = ConnectPair(near_control, far_control);
  near.control = std::move(near_control);
  far.control = std::move(far_control);
  near.outgoing_streams.resize(near.outgoing.transport->Connections(near.outgoing.peer));
  far.incoming_streams.resize(near.outgoing_streams.size());
  for (size_t i = 0; status.ok() && i < near.outgoing_streams.size(); ++i) {
    status = ConnectPair(near.outgoing_streams[i], far.incoming_streams[i]);
  }
  return status;
}

}  // namespace

Status LinkLoopback(const std::shared_ptr<LocalEndpoint> &endpoint, const std::shared_ptr<LinkTable> &table,
                    const LoopbackPeer &peer) {
  LinkParts near;
  LinkParts far;
  if (Status status = IntroduceHalves(*endpoint, near, far); !status.ok()) {
    return status;
  }
  if (Status status = Connect(*endpoint, near, far); !status.ok()) {
    return status;
  }
  near.peer.cluster_id = peer.cluster_id;
  near.caller_id = peer.caller_id;
  near.peer_address = peer.address;
  near.comm_name = peer.comm_name;
  far.caller_id = far.peer.cluster_id;
  far.peer_address = peer.address;
  const std::shared_ptr<Link> far_half = Link::Create(endpoint, {}, std::move(far));
  near.other_half = far_half;
  const std::shared_ptr<Link> near_half = Link::Create(endpoint, table, std::move(near));
  near_half->MarkAskedHere();
  far_half->Establish();
  return table->Adopt(near_half);
}

}  // namespace datadist
