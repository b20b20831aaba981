#include "link/server_handshake.h"

#include <algorithm>
#include <utility>

namespace datadist {
namespace {

using llm_datadist::LLM_ALREADY_LINK;
using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_LINK_FAILED;
using llm_datadist::LLM_PARAM_INVALID;

std::string RangeText(const VersionRange &range) {
  return std::to_string(range.lowest) + ".." + std::to_string(range.highest);
}

}  // namespace

ServerHandshake::ServerHandshake(std::shared_ptr<LocalEndpoint> endpoint, std::shared_ptr<LinkTable> table,
                                 std::string peer_address)
    : endpoint_(std::move(endpoint)), table_(std::move(table)) {
  parts_.peer_address = std::move(peer_address);
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

Result<std::vector<uint8_t>> ServerHandshake::OnFrame(const Frame &frame) {
  return frame.type == MessageType::kHello ? OnHello(frame) : OnReady(frame);
}

Status ServerHandshake::CheckClient(const Hello &hello) const {
  const uint64_t client_id = hello.client.cluster_id;
  if (client_id == endpoint_->cluster_id()) {
    return Status(LLM_PARAM_INVALID, "cluster id " + std::to_string(client_id) + " is the server's own");
  }
  if (!endpoint_->options().local_comm_res.ok()) {
    return endpoint_->options().local_comm_res;
  }
  if (!hello.force_link && table_->HasLive(client_id)) {
    return Status(LLM_ALREADY_LINK, "cluster " + std::to_string(client_id) + " is linked already");
  }
  return Status::Ok();
}

Result<std::vector<uint8_t>> ServerHandshake::OnHello(const Frame &frame) {
  const Result<VersionRange> versions = DecodeVersionRange(frame.body);
  if (!versions.ok()) {
    return versions.status();
  }
  if (versions.value().lowest > kProtocolVersion || versions.value().highest < kProtocolVersion) {
    return Status(LLM_LINK_FAILED, "protocol versions differ: client " + RangeText(versions.value()) + ", server " +
                                       RangeText(VersionRange{kProtocolVersion, kProtocolVersion}));
  }
  Result<Hello> hello = Decode<Hello>(frame.body);
  if (!hello.ok()) {
    return hello.status();
  }
  if (Status status = CheckClient(hello.value()); !status.ok()) {
    return status;
  }
  Result<LinkTable::Reservation> reservation = table_->ReserveServe(hello.value().client.cluster_id);
  if (!reservation.ok()) {
    return reservation.status();
  }
  const Result<Challenge> challenge = RandomBytes();
  const Result<LinkToken> token = RandomBytes();
  if (!challenge.ok() || !token.ok()) {
    return challenge.ok() ? token.status() : challenge.status();
  }
  reservation_ = std::move(reservation).value();
  client_patience_ = std::chrono::milliseconds(hello.value().remaining_ms);
  parts_.peer = std::move(hello.value().client);
  parts_.caller_id = parts_.peer.cluster_id;
  parts_.challenge = challenge.value();
  parts_.token = token.value();
  parts_.slot = std::make_unique<ProbeSlot>();
  parts_.slot->Set(parts_.peer.challenge);
  state_ = State::kAwaitReady;
  const Welcome welcome{endpoint_->Info(*parts_.slot, parts_.challenge), parts_.token};
  return EncodeFrame(MessageType::kWelcome, frame.seq, Encode(welcome));
}

Result<std::vector<uint8_t>> ServerHandshake::OnReady(const Frame &frame) {
  const Result<Ready> ready = Decode<Ready>(frame.body);
  if (!ready.ok()) {
    return ready.status();
  }
  Result<TransportChoice> choice = ChooseTransport(endpoint_->options(), parts_.peer, parts_.challenge);
  if (!choice.ok()) {
    return choice.status();
  }
  parts_.incoming = ready.value().transport;
  parts_.outgoing = std::move(choice).value();
  if (parts_.incoming == TransportKind::kTcp) {
    parts_.incoming_streams.resize(parts_.peer.tcp_streams);
  }
  if (parts_.outgoing.kind == TransportKind::kTcp) {
    parts_.outgoing_streams.resize(endpoint_->options().tcp_streams);
  }
  state_ = State::kAwaitEstablished;
  return EncodeFrame(MessageType::kReady, frame.seq, Encode(Ready{parts_.outgoing.kind, parts_.outgoing.reason}));
}

bool ServerHandshake::Wants(const Attach &attach) const {
  const auto &streams = attach.initiator == Initiator::kClient ? parts_.incoming_streams : parts_.outgoing_streams;
  return state_ == State::kAwaitEstablished && attach.token == parts_.token && attach.index < streams.size() &&
         !streams[attach.index];
}

void ServerHandshake::TakeStream(const Attach &attach, Fd stream) {
  auto &streams = attach.initiator == Initiator::kClient ? parts_.incoming_streams : parts_.outgoing_streams;
  streams[attach.index] = std::move(stream);
}

Result<std::shared_ptr<Link>> ServerHandshake::Finish(Fd control) {
  const auto attached = [](const std::vector<Fd> &streams) {
    return std::all_of(streams.begin(), streams.end(), [](const Fd &stream) { return static_cast<bool>(stream); });
  };
  if (!attached(parts_.incoming_streams) || !attached(parts_.outgoing_streams)) {
    return Status(LLM_FAILED, "ESTABLISHED before all data connections were attached");
  }
  state_ = State::kDone;
  parts_.control = std::move(control);
  std::shared_ptr<Link> link;
  try {
    link = Link::Create(endpoint_, table_, std::move(parts_));
  } catch (const std::exception &error) {
    return Status(LLM_FAILED, std::string("no memory or threads for another link: ") + error.what());
  }
  const Result<std::shared_ptr<Link>> replaced = table_->Insert(link);
  if (!replaced.ok()) {
    return replaced.status();
  }
  if (replaced.value() != nullptr) {
    replaced.value()->Close("replaced by a new link");
  }
  return link;
}

}  // namespace datadist
