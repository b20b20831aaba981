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

struct SocketPair {
  Fd near;
  Fd far;
};

Result<SocketPair> MakeSocketPair() {
  int fds[2] = {-1, -1};
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) != 0) {
    return Status(LLM_LINK_FAILED, "socketpair: " + ErrnoText(errno));
  }
  return SocketPair{Fd(fds[0]), Fd(fds[1])};
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
  Result<TransportChoice> choice = ChooseTransport(endpoint.options(), near.peer, near.process.get());
  if (!choice.ok()) {
    return choice.status();
  }
  near.outgoing = std::move(choice).value();
  far.incoming = near.outgoing.kind;
  // Nobody initiates from the far half: it is in no table.
  far.outgoing.kind = near.incoming = TransportKind::kLocal;
  Result<SocketPair> control = MakeSocketPair();
  if (!control.ok()) {
    return control.status();
  }
  near.control = std::move(control.value().near);
  far.control = std::move(control.value().far);
  const uint16_t streams = near.outgoing.kind == TransportKind::kTcp ? endpoint.options().tcp_streams : uint16_t{0};
  for (uint16_t i = 0; i < streams; ++i) {
    Result<SocketPair> stream = MakeSocketPair();
    if (!stream.ok()) {
      return stream.status();
    }
    near.outgoing_streams.push_back(std::move(stream.value().near));
    far.incoming_streams.push_back(std::move(stream.value().far));
  }
  return Status::Ok();
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
