#include "link/client_handshake.h"

#include <string>
#include <utility>
#include <vector>

#include "control/opening.h"
#include "link/loopback.h"

namespace datadist {
namespace {

using llm_datadist::LLM_ALREADY_LINK;
using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_LINK_FAILED;
using llm_datadist::LLM_PARAM_INVALID;

class ClientHandshake {
 public:
  ClientHandshake(std::shared_ptr<LocalEndpoint> endpoint, std::shared_ptr<LinkTable> table, DialTarget target,
                  Deadline deadline)
      : endpoint_(std::move(endpoint)), table_(std::move(table)), target_(std::move(target)), deadline_(deadline) {}

  Status Run();

 private:
  Status Reserve(uint64_t peer_id, LinkTable::Reservation &reservation);
  bool ForceLink() const;
  Status Greet();
  Status CheckPeer() const;
  Status MeetPeer();
  Status LinkToSelf();
  Status AgreeOnTransports();
  Status AttachStreams(Initiator initiator, const Route &route, std::vector<Fd> &streams);
  Status Finish();
  Result<Frame> Exchange(FrameSocket &socket, MessageType request, const std::vector<uint8_t> &body, MessageType answer);

  const std::shared_ptr<LocalEndpoint> endpoint_;
  const std::shared_ptr<LinkTable> table_;
  const DialTarget target_;
  const Deadline deadline_;
  LinkTable::Reservation by_expected_id_;
  LinkTable::Reservation by_announced_id_;
  LinkParts parts_;
  bool force_link_ = false;
  bool linked_ = false;  // and no more steps are needed
  uint32_t seq_ = 0;
};

Status ClientHandshake::Reserve(uint64_t peer_id, LinkTable::Reservation &reservation) {
  Result<LinkTable::Reservation> reserved = table_->ReserveDial(peer_id);
  if (!reserved.ok()) {
    return reserved.status();
  }
  reservation = std::move(reserved).value();
  return Status::Ok();
}

// Whether the ends drop a link that they may have. A comm never takes over another's link; with the hixl backend only
// the announced id counts, which is not known yet.
bool ClientHandshake::ForceLink() const {
  if (!target_.comm_name.empty()) {
    return false;
  }
  return endpoint_->options().hixl_backend || !table_->HasLive(target_.expected_id);
}

// One request and its answer; a REJECT becomes the status that it carries.
Result<Frame> ClientHandshake::Exchange(FrameSocket &socket, MessageType request, const std::vector<uint8_t> &body,
                                        MessageType answer) {
  if (Status status = SendFrame(socket, request, ++seq_, body, deadline_); !status.ok()) {
    return status;
  }
  Result<Frame> frame = RecvFrame(socket, TypeSet(answer, MessageType::kReject), deadline_);
  return frame.ok() && frame.value().type == MessageType::kReject ? Refusal(frame.value()) : frame;
}

Status ClientHandshake::Greet() {
  Hello hello;
  hello.versions = VersionRange{kProtocolVersion, kProtocolVersion};
  hello.client = endpoint_->Info();
  hello.remaining_ms = deadline_.WireMillis();
  hello.force_link = force_link_ = ForceLink();
  if (const std::shared_ptr<Link> lost = table_->Find(target_.expected_id); lost != nullptr && !lost->alive()) {
    hello.replaced = lost->token();
  }
  hello.comm_name = target_.comm_name;
  hello.comm_id = target_.comm_id;
  const Result<Frame> frame =
      Exchange(parts_.control, MessageType::kHello, Encode(hello), MessageType::kWelcome);
  if (!frame.ok()) {
    return frame.status();
  }
  Result<Welcome> welcome = Decode<Welcome>(frame.value().body);
  if (!welcome.ok()) {
    return welcome.status();
  }
  parts_.peer = std::move(welcome.value().server);
  parts_.token = welcome.value().token;
  return CheckPeer();
}

Status ClientHandshake::CheckPeer() const {
  const uint64_t peer_id = parts_.peer.cluster_id;
  if (peer_id != target_.expected_id && (target_.expected_id != 0 || !target_.comm_name.empty())) {
    return Status(LLM_PARAM_INVALID, "cluster " + std::to_string(peer_id) + " listens there, not cluster " +
                                         std::to_string(target_.expected_id));
  }
  const bool ourselves = parts_.peer.incarnation == endpoint_->incarnation();
  if (ourselves && (parts_.process == nullptr || !parts_.process->IsSelf())) {
    return Status(LLM_LINK_FAILED, "the peer gives itself out as this very endpoint, and is another process");
  }
  if (!ourselves && !MayBeCalled(*endpoint_, peer_id, target_.comm_name)) {
    return Status(LLM_PARAM_INVALID, "the peer's cluster id " + std::to_string(peer_id) + " is our own");
  }
  return CheckSameAccess(*endpoint_, parts_.peer);
}

Status ClientHandshake::MeetPeer() {
  const uint64_t peer_id = parts_.peer.cluster_id;
  const std::shared_ptr<Link> link = table_->Find(peer_id);
  const bool live = link != nullptr && !link->LoseIfGone();
  if (live && endpoint_->options().hixl_backend && !link->asked_here()) {
    link->MarkAskedHere();
    linked_ = true;
    return Status::Ok();
  }
  // There was none under the expected id when we decided to force ours: the peer's own dial has crossed it, and what is
  // moved over that link already must not be lost.
  const bool crossed = peer_id == target_.expected_id;
  // Who was dialled as "whoever answers" and is somebody we know, must be the one we know.
  const bool same_peer = live && link->IsOf(parts_.peer.incarnation, parts_.process.get(), LinkToken{});
  if (live && (!force_link_ || crossed || endpoint_->options().hixl_backend || !same_peer)) {
    return Status(LLM_ALREADY_LINK, "cluster " + std::to_string(peer_id) + " is linked already");
  }
  if (!by_expected_id_.Holds(peer_id)) {
    if (Status status = Reserve(peer_id, by_announced_id_); !status.ok()) {
      return status;
    }
  }
  return parts_.peer.incarnation == endpoint_->incarnation() ? LinkToSelf() : Status::Ok();
}

Status ClientHandshake::LinkToSelf() {
  linked_ = true;
  return LinkLoopback(endpoint_, table_,
                      {endpoint_->cluster_id(), target_.expected_id, target_.address.ToString(), target_.comm_name});
}

Status ClientHandshake::AgreeOnTransports() {
  const Transports &transports = endpoint_->transports();
  Result<Route> outgoing = transports.Choose(parts_.peer.cluster_id, parts_.peer.transports, parts_.process);
  if (!outgoing.ok()) {
    return outgoing.status();
  }
  parts_.outgoing = std::move(outgoing).value();
  const Result<Frame> frame = Exchange(parts_.control, MessageType::kReady,
                                       Encode(Ready{parts_.outgoing.name, parts_.outgoing.reason}), MessageType::kReady);
  if (!frame.ok()) {
    return frame.status();
  }
  const Result<Ready> ready = Decode<Ready>(frame.value().body);
  if (!ready.ok()) {
    return ready.status();
  }
  Result<Route> incoming =
      transports.Admit(parts_.peer.cluster_id, ready.value().transport, parts_.peer.transports, parts_.process);
  if (!incoming.ok()) {
    return incoming.status();
  }
  parts_.incoming = std::move(incoming).value();
  Status attached = AttachStreams(Initiator::kClient, parts_.outgoing, parts_.outgoing_streams);
  return attached.ok() ? AttachStreams(Initiator::kServer, parts_.incoming, parts_.incoming_streams) : attached;
}

Status ClientHandshake::AttachStreams(Initiator initiator, const Route &route, std::vector<Fd> &streams) {
  for (uint16_t index = 0; index < route.transport->Connections(route.peer); ++index) {
    Result<Fd> dialled = DialTcp(target_.address, deadline_);
    if (!dialled.ok()) {
      return dialled.status();
    }
    FrameSocket stream(std::move(dialled).value());
    Attach attach{parts_.token, initiator, index, {}};
    attach.proof = ProofOf(parts_.streams, attach);
    const Result<Frame> frame = Exchange(stream, MessageType::kAttach, Encode(attach), MessageType::kAttached);
    if (!frame.ok()) {
      return frame.status();
    }
    streams.push_back(std::move(stream.fd));
  }
  return Status::Ok();
}

Status ClientHandshake::Finish() {
  const Result<Frame> frame =
      Exchange(parts_.control, MessageType::kEstablished, {}, MessageType::kEstablished);
  if (!frame.ok()) {
    return frame.status();
  }
  const std::shared_ptr<Link> link = Link::Create(endpoint_, table_, std::move(parts_));
  link->MarkAskedHere();
  return table_->Adopt(link);
}

Status ClientHandshake::Run() {
  if (target_.expected_id != 0) {
    if (Status status = Reserve(target_.expected_id, by_expected_id_); !status.ok()) {
      return status;
    }
  }
  Result<OpenConnection> control = DialOpen(target_.address, endpoint_->options().trust, deadline_);
  if (!control.ok()) {
    return control.status();
  }
  parts_.control = std::move(control.value().socket);
  parts_.streams = control.value().streams;
  parts_.process = std::move(control.value().process);
  parts_.caller_id = target_.expected_id;
  parts_.peer_address = target_.address.ToString();
  parts_.comm_name = target_.comm_name;
  parts_.comm_id = target_.comm_id;
  for (const auto step : {&ClientHandshake::Greet, &ClientHandshake::MeetPeer, &ClientHandshake::AgreeOnTransports,
                          &ClientHandshake::Finish}) {
    if (Status status = (this->*step)(); !status.ok() || linked_) {
      return status;
    }
  }
  return Status::Ok();
}

}  // namespace

Status DialLink(const std::shared_ptr<LocalEndpoint> &endpoint, const std::shared_ptr<LinkTable> &table,
                const DialTarget &target, Deadline deadline) {
  const Status status = ClientHandshake(endpoint, table, target, deadline).Run();
  if (status.ok()) {
    return status;
  }
  // A connection that breaks or talks nonsense while it is being made is a link that could not be made.
  const auto code = status.code() == LLM_FAILED ? LLM_LINK_FAILED : status.code();
  return Status(code, "link to " + target.address.ToString() + ": " + status.text());
}

}  // namespace datadist
