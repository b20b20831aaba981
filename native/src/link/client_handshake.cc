#include "link/client_handshake.h"

#include <string>
#include <utility>
#include <vector>

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
  Status Greet();
  Status CheckPeer(bool force_link);
  Status AgreeOnTransports();
  Status AttachStreams(Initiator initiator, uint16_t count, std::vector<Fd> &streams);
  Status Finish();
  Result<Frame> Exchange(int fd, MessageType request, const std::vector<uint8_t> &body, MessageType answer);

  const std::shared_ptr<LocalEndpoint> endpoint_;
  const std::shared_ptr<LinkTable> table_;
  const DialTarget target_;
  const Deadline deadline_;
  LinkTable::Reservation by_expected_id_;
  LinkTable::Reservation by_announced_id_;
  LinkParts parts_;
  uint32_t seq_ = 0;
};

// One request and its answer; a REJECT becomes the status that it carries.
Result<Frame> ClientHandshake::Exchange(int fd, MessageType request, const std::vector<uint8_t> &body,
                                        MessageType answer) {
  if (Status status = SendFrame(fd, request, ++seq_, body, deadline_); !status.ok()) {
    return status;
  }
  Result<Frame> frame = RecvFrame(fd, TypeSet(answer, MessageType::kReject), deadline_);
  if (!frame.ok() || frame.value().type != MessageType::kReject) {
    return frame;
  }
  const Result<Reject> reject = Decode<Reject>(frame.value().body);
  if (!reject.ok()) {
    return reject.status();
  }
  return Status(reject.value().status.code(), "refused by the peer: " + reject.value().status.text());
}

Status ClientHandshake::Greet() {
  const Result<Challenge> challenge = RandomBytes();
  if (!challenge.ok()) {
    return challenge.status();
  }
  parts_.challenge = challenge.value();
  parts_.slot = std::make_unique<ProbeSlot>();
  Hello hello;
  hello.versions = VersionRange{kProtocolVersion, kProtocolVersion};
  hello.client = endpoint_->Info(*parts_.slot, parts_.challenge);
  hello.remaining_ms = RemainingMillis(deadline_);
  hello.force_link = !table_->HasLive(target_.expected_id);
  const Result<Frame> frame =
      Exchange(parts_.control.get(), MessageType::kHello, Encode(hello), MessageType::kWelcome);
  if (!frame.ok()) {
    return frame.status();
  }
  Result<Welcome> welcome = Decode<Welcome>(frame.value().body);
  if (!welcome.ok()) {
    return welcome.status();
  }
  parts_.peer = std::move(welcome.value().server);
  parts_.token = welcome.value().token;
  parts_.slot->Set(parts_.peer.challenge);
  return CheckPeer(hello.force_link);
}

Status ClientHandshake::CheckPeer(bool force_link) {
  const uint64_t peer_id = parts_.peer.cluster_id;
  if (peer_id == endpoint_->cluster_id()) {
    return Status(LLM_PARAM_INVALID, "the peer's cluster id " + std::to_string(peer_id) + " is our own");
  }
  if (!force_link && table_->HasLive(peer_id)) {
    return Status(LLM_ALREADY_LINK, "cluster " + std::to_string(peer_id) + " is linked already");
  }
  if (peer_id == target_.expected_id && peer_id != 0) {
    return Status::Ok();  // reserved before dialling
  }
  Result<LinkTable::Reservation> reservation = table_->ReserveDial(peer_id);
  if (!reservation.ok()) {
    return reservation.status();
  }
  by_announced_id_ = std::move(reservation).value();
  return Status::Ok();
}

Status ClientHandshake::AgreeOnTransports() {
  Result<TransportChoice> choice = ChooseTransport(endpoint_->options(), parts_.peer, parts_.challenge);
  if (!choice.ok()) {
    return choice.status();
  }
  parts_.outgoing = std::move(choice).value();
  const Result<Frame> frame =
      Exchange(parts_.control.get(), MessageType::kReady, Encode(Ready{parts_.outgoing.kind, parts_.outgoing.reason}),
               MessageType::kReady);
  if (!frame.ok()) {
    return frame.status();
  }
  const Result<Ready> ready = Decode<Ready>(frame.value().body);
  if (!ready.ok()) {
    return ready.status();
  }
  parts_.incoming = ready.value().transport;
  if (parts_.outgoing.kind == TransportKind::kTcp) {
    if (Status status = AttachStreams(Initiator::kClient, endpoint_->options().tcp_streams, parts_.outgoing_streams);
        !status.ok()) {
      return status;
    }
  }
  if (parts_.incoming == TransportKind::kTcp) {
    return AttachStreams(Initiator::kServer, parts_.peer.tcp_streams, parts_.incoming_streams);
  }
  return Status::Ok();
}

Status ClientHandshake::AttachStreams(Initiator initiator, uint16_t count, std::vector<Fd> &streams) {
  for (uint16_t index = 0; index < count; ++index) {
    Result<Fd> stream = Dial(target_.address, deadline_);
    if (!stream.ok()) {
      return stream.status();
    }
    const Result<Frame> frame = Exchange(stream.value().get(), MessageType::kAttach,
                                         Encode(Attach{parts_.token, initiator, index}), MessageType::kAttached);
    if (!frame.ok()) {
      return frame.status();
    }
    streams.push_back(std::move(stream).value());
  }
  return Status::Ok();
}

Status ClientHandshake::Finish() {
  const Result<Frame> frame =
      Exchange(parts_.control.get(), MessageType::kEstablished, {}, MessageType::kEstablished);
  if (!frame.ok()) {
    return frame.status();
  }
  const std::shared_ptr<Link> link = Link::Create(endpoint_, table_, std::move(parts_));
  const Result<std::shared_ptr<Link>> replaced = table_->Insert(link);
  if (!replaced.ok()) {
    return replaced.status();
  }
  link->Establish();
  if (replaced.value() != nullptr) {
    replaced.value()->Close("replaced by a new link");
  }
  return Status::Ok();
}

Status ClientHandshake::Run() {
  if (target_.expected_id != 0) {
    Result<LinkTable::Reservation> reservation = table_->ReserveDial(target_.expected_id);
    if (!reservation.ok()) {
      return reservation.status();
    }
    by_expected_id_ = std::move(reservation).value();
  }
  Result<Fd> control = Dial(target_.address, deadline_);
  if (!control.ok()) {
    return control.status();
  }
  parts_.control = std::move(control).value();
  parts_.caller_id = target_.expected_id;
  parts_.peer_address = target_.address.ToString();
  for (const auto step : {&ClientHandshake::Greet, &ClientHandshake::AgreeOnTransports, &ClientHandshake::Finish}) {
    if (Status status = (this->*step)(); !status.ok()) {
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
