#include "link/server_handshake.h"

#include <algorithm>
#include <utility>

#include "base/random.h"

namespace datadist {
namespace {

using llm_datadist::LLM_ALREADY_LINK;
using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_LINK_FAILED;
using llm_datadist::LLM_NOT_YET_LINK;
using llm_datadist::LLM_PARAM_INVALID;

}  // namespace

ServerHandshake::ServerHandshake(std::shared_ptr<LocalEndpoint> endpoint, std::shared_ptr<LinkTable> table,
                                 Admits admits, const Caller &caller)
    : endpoint_(std::move(endpoint)), table_(std::move(table)), admits_(admits) {
  parts_.peer_address = caller.name;
  parts_.process = caller.process;
}

TypeSet ServerHandshake::legal() const {
  switch (state_) {
    case State::kAwaitHello:
      return TypeSet(MessageType::kHello, MessageType::kAttach, MessageType::kUnlink);
    case State::kAwaitReady:
      return TypeSet(MessageType::kReady);
    case State::kAwaitEstablished:
      return TypeSet(MessageType::kEstablished);
    case State::kDone:
      break;
  }
  return TypeSet();
}

// Our half of a link of that comm that the client has given up: it is lost, or the client's very process dials again,
// because the last answer of the handshake came too late or its comm ended before all were linked.
std::shared_ptr<Link> ServerHandshake::FindAbandoned(const std::string &comm_name, const EndpointInfo &client) const {
  std::shared_ptr<Link> link = table_->Find(client.cluster_id);
  const bool same_comm = link != nullptr && !comm_name.empty() && link->comm_name() == comm_name;
  return same_comm && (link->LoseIfGone() || link->IsOf(client.incarnation, parts_.process.get(), replaced_)) ? link
                                                                                                            : nullptr;
}

// A live link gives way only to its own peer, who has lost its half or wants it anew: any other that comes under that id
// would have it taken over.
Status ServerHandshake::CheckFree(const EndpointInfo &client) const {
  const std::shared_ptr<Link> link = table_->Find(client.cluster_id);
  if (link == nullptr || link->LoseIfGone() || FindAbandoned(parts_.comm_name, client) != nullptr ||
      (force_link_ && link->IsOf(client.incarnation, parts_.process.get(), replaced_))) {
    return Status::Ok();
  }
  return Status(LLM_ALREADY_LINK, "cluster " + std::to_string(client.cluster_id) + " is linked already");
}

// A link is made once for each comm of both ends, so that nobody who has unlinked and made a later comm of the name is
// taken into the earlier one. An abandoned link is made again: while the comm is prepared by anyone, afterwards only by
// the comm that had it.
Status ServerHandshake::CheckComm(const std::string &name, int64_t comm_id, const EndpointInfo &client) const {
  if (name.empty()) {
    return admits_ == Admits::kAll
               ? Status::Ok()
               : Status(LLM_LINK_FAILED, "this address is for bilateral links, not for clients of a server");
  }
  const uint64_t id = client.cluster_id;
  const std::shared_ptr<CommWaiter> comm = table_->FindCommOnLoop(name, id);
  const std::shared_ptr<Link> abandoned = FindAbandoned(name, client);
  const bool again = abandoned != nullptr &&
                     (comm != nullptr ||
                      (abandoned->comm_id() == comm_id && abandoned->peer_incarnation() == client.incarnation));
  if (!again && (comm == nullptr || !comm->AwaitsOnLoop(id))) {
    return Status(LLM_NOT_YET_LINK, "cluster " + std::to_string(endpoint_->cluster_id()) +
                                        " does not wait for cluster " + std::to_string(id) + " in comm '" + name +
                                        "'");
  }
  return Status::Ok();
}

Status ServerHandshake::CheckClient(const Hello &hello) const {
  const uint64_t client_id = hello.client.cluster_id;
  if (Status status = CheckComm(hello.comm_name, hello.comm_id, hello.client); !status.ok()) {
    return status;
  }
  if (Status status = CheckSameAccess(*endpoint_, hello.client); !status.ok()) {
    return status;
  }
  if (!MayBeCalled(*endpoint_, client_id, hello.comm_name)) {
    return Status(LLM_PARAM_INVALID, "cluster id " + std::to_string(client_id) + " is the server's own");
  }
  if (!endpoint_->options().local_comm_res.ok()) {
    return endpoint_->options().local_comm_res;
  }
  return CheckFree(hello.client);
}

Status ServerHandshake::Admit(const Hello &hello) {
  if (Status status = CheckClient(hello); !status.ok()) {
    return status;
  }
  Result<LinkTable::Reservation> reservation = table_->ReserveServe(hello.client.cluster_id, hello.client.incarnation);
  if (!reservation.ok()) {
    return reservation.status();
  }
  reservation_ = std::move(reservation).value();
  return Status::Ok();
}

void ServerHandshake::NoteRefusal(const Hello &hello, const Status &why) const {
  if (const auto comm = table_->FindCommOnLoop(hello.comm_name, hello.client.cluster_id)) {
    comm->OnPeerRefusedOnLoop(hello.client.cluster_id, why);
  }
}

Result<std::vector<uint8_t>> ServerHandshake::OnHello(const std::vector<uint8_t> &body,
                                                     const std::optional<Digest> &streams) {
  const Result<VersionRange> versions = DecodeVersionRange(body);
  if (!versions.ok()) {
    return versions.status();
  }
  if (Status status = CheckVersions(versions.value()); !status.ok()) {
    return status;
  }
  Result<Hello> hello = Decode<Hello>(body);
  if (!hello.ok()) {
    return hello.status();
  }
  const uint64_t client_id = hello.value().client.cluster_id;
  force_link_ = hello.value().force_link;
  replaced_ = hello.value().replaced;
  parts_.comm_name = hello.value().comm_name;
  parts_.comm_id = hello.value().comm_id;
  const bool self = hello.value().client.incarnation == endpoint_->incarnation();
  if (!self) {
    if (Status status = Admit(hello.value()); !status.ok()) {
      NoteRefusal(hello.value(), status);
      return status;
    }
  }
  const Result<LinkToken> token = RandomBytes();
  if (!token.ok()) {
    return token.status();
  }
  // With the hixl backend the client only now learns whom it reached, and whether it has that link.
  may_end_ = self || (endpoint_->options().hixl_backend && table_->HasLive(client_id));
  client_patience_ = std::chrono::milliseconds(hello.value().remaining_ms);
  parts_.peer = std::move(hello.value().client);
  parts_.caller_id = parts_.peer.cluster_id;
  parts_.token = token.value();
  parts_.streams = streams;
  state_ = self ? State::kDone : State::kAwaitReady;
  return Encode(Welcome{endpoint_->Info(), parts_.token});
}

Result<std::vector<uint8_t>> ServerHandshake::OnReady(const std::vector<uint8_t> &body) {
  const Result<Ready> ready = Decode<Ready>(body);
  if (!ready.ok()) {
    return ready.status();
  }
  const Transports &transports = endpoint_->transports();
  Result<Route> outgoing = transports.Choose(parts_.peer.cluster_id, parts_.peer.transports, parts_.process);
  if (!outgoing.ok()) {
    return outgoing.status();
  }
  Result<Route> incoming =
      transports.Admit(parts_.peer.cluster_id, ready.value().transport, parts_.peer.transports, parts_.process);
  if (!incoming.ok()) {
    return incoming.status();
  }
  parts_.outgoing = std::move(outgoing).value();
  parts_.incoming = std::move(incoming).value();
  parts_.outgoing_streams.resize(parts_.outgoing.transport->Connections(parts_.outgoing.peer));
  parts_.incoming_streams.resize(parts_.incoming.transport->Connections(parts_.incoming.peer));
  state_ = State::kAwaitEstablished;
  return Encode(Ready{parts_.outgoing.name, parts_.outgoing.reason});
}

bool ServerHandshake::Wants(const Attach &attach) const {
  const auto &streams = attach.initiator == Initiator::kClient ? parts_.incoming_streams : parts_.outgoing_streams;
  return state_ == State::kAwaitEstablished && SameBytes(attach.token, parts_.token) &&
         SameBytes(attach.proof, ProofOf(parts_.streams, attach)) && attach.index < streams.size() &&
         !streams[attach.index];
}

void ServerHandshake::TakeStream(const Attach &attach, Fd stream) {
  auto &streams = attach.initiator == Initiator::kClient ? parts_.incoming_streams : parts_.outgoing_streams;
  streams[attach.index] = std::move(stream);
}

Result<std::shared_ptr<Link>> ServerHandshake::Finish(FrameSocket control) {
  const auto attached = [](const std::vector<Fd> &streams) {
    return std::all_of(streams.begin(), streams.end(), [](const Fd &stream) { return static_cast<bool>(stream); });
  };
  if (!attached(parts_.incoming_streams) || !attached(parts_.outgoing_streams)) {
    return Status(LLM_FAILED, "ESTABLISHED before all data connections were attached");
  }
  // Another connection may have become the link of that id meanwhile.
  if (Status status = CheckFree(parts_.peer); !status.ok()) {
    return status;
  }
  // The comm may have ended meanwhile, and would leave this link behind.
  if (Status status = CheckComm(parts_.comm_name, parts_.comm_id, parts_.peer); !status.ok()) {
    return status;
  }
  state_ = State::kDone;
  parts_.control = std::move(control);
  std::shared_ptr<Link> link;
  try {
    link = Link::Create(endpoint_, table_, std::move(parts_));
  } catch (const std::exception &error) {
    return Status(LLM_FAILED, std::string("no memory or threads for another link: ") + error.what());
  }
  if (Status inserted = table_->Insert(link); !inserted.ok()) {
    return inserted;
  }
  // Before the link is established: whoever sees it may ask for it too, and must not be told that it is being made.
  reservation_ = LinkTable::Reservation();
  return link;
}

}  // namespace datadist
