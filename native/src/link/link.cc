#include "link/link.h"

#include <algorithm>
#include <utility>

#include "base/log.h"
#include "control/opening.h"
#include "link/link_table.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_NOT_YET_LINK;
using llm_datadist::LLM_TIMEOUT;
using llm_datadist::LLM_UNLINK_FAILED;

constexpr bool MayBecome(LinkState from, LinkState to) {
  constexpr bool kLegal[4][4] = {
      // to: Connecting, Established, Lost, Closed
      {false, true, false, true},   // from Connecting
      {false, false, true, true},   // from Established
      {false, false, false, true},  // from Lost
      {false, false, false, false},  // from Closed
  };
  return kLegal[static_cast<size_t>(from)][static_cast<size_t>(to)];
}

}  // namespace

StreamProof ProofOf(const std::optional<Digest> &streams, const Attach &attach) {
  StreamProof proof{};
  if (streams.has_value()) {
    Attach said = attach;
    said.proof = {};
    const std::vector<uint8_t> body = Encode(said);
    const Digest digest = HmacSha256(*streams, body.data(), body.size());
    std::copy_n(digest.begin(), proof.size(), proof.begin());
  }
  return proof;
}

std::shared_ptr<Link> Link::Create(std::shared_ptr<LocalEndpoint> endpoint, std::weak_ptr<LinkTable> table,
                                   LinkParts parts) {
  FrameSocket control = std::move(parts.control);
  std::vector<Fd> outgoing_streams = std::move(parts.outgoing_streams);
  std::vector<Fd> incoming_streams = std::move(parts.incoming_streams);
  std::shared_ptr<Link> link(new Link(std::move(endpoint), std::move(table), std::move(parts)));
  link->OpenPaths(std::move(control), std::move(outgoing_streams), std::move(incoming_streams));
  return link;
}

Link::Link(std::shared_ptr<LocalEndpoint> endpoint, std::weak_ptr<LinkTable> table, LinkParts parts)
    : endpoint_(std::move(endpoint)),
      table_(std::move(table)),
      peer_(std::move(parts.peer)),
      caller_id_(parts.caller_id),
      peer_address_(std::move(parts.peer_address)),
      token_(parts.token),
      process_(std::move(parts.process)),
      outgoing_(std::move(parts.outgoing)),
      incoming_(std::move(parts.incoming)),
      comm_name_(std::move(parts.comm_name)),
      comm_id_(parts.comm_id),
      other_half_(std::move(parts.other_half)) {}

Link::~Link() {
  // Empty where Create itself failed half-way, for want of memory or threads.
  if (session_ != nullptr && owner_path_ != nullptr) {
    Close("link dropped");
  }
}

void Link::OpenPaths(FrameSocket control, std::vector<Fd> outgoing_streams, std::vector<Fd> incoming_streams) {
  session_ = Session::Create(endpoint_->loop(), std::move(control), endpoint_->options().heartbeat_interval);
  path_ = outgoing_.transport->MakePath(outgoing_.peer, std::move(outgoing_streams), this);
  owner_path_ = incoming_.transport->Serve(incoming_.peer, std::move(incoming_streams));
}

std::string Link::Name() const {
  return "link to cluster " + std::to_string(peer_.cluster_id) + " (" + peer_address_ + ")";
}

bool Link::alive() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return state_ == LinkState::kEstablished;
}

llm_datadist::LinkReport Link::Report() const {
  llm_datadist::LinkReport report;
  report.alive = alive();
  report.transport = outgoing_.name;
  report.transport_reason = outgoing_.reason;
  report.peer = peer_address_;
  report.bytes_pulled = bytes_pulled_.load(std::memory_order_relaxed);
  report.bytes_pushed = bytes_pushed_.load(std::memory_order_relaxed);
  report.blocks_verified = blocks_verified_.load(std::memory_order_relaxed);
  report.blocks_wrong = blocks_wrong_.load(std::memory_order_relaxed);
  return report;
}

// ---- states ----

bool Link::MoveTo(LinkState next, const std::string &reason) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!MayBecome(state_, next)) {
    return false;
  }
  state_ = next;
  if (end_reason_.empty()) {
    end_reason_ = reason;
  }
  return true;
}

void Link::Establish(std::optional<uint32_t> established_seq) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!MayBecome(state_, LinkState::kEstablished)) {
      return;
    }
    state_ = LinkState::kEstablished;
    if (established_seq.has_value()) {
      session_->Send(MessageType::kEstablished, *established_seq, {});
    }
  }
  const std::string why = outgoing_.reason.empty() ? "" : " (" + outgoing_.reason + ")";
  const bool fallback = !why.empty() && endpoint_->options().forced_transport.empty();
  Log(fallback ? LogLevel::kWarning : LogLevel::kInfo, Name() + " established, transport " + outgoing_.name + why);
  session_->Start(weak_from_this());
}

void Link::Lose(CloseCause cause, const std::string &reason) {
  if (!MoveTo(LinkState::kLost, reason)) {
    return;
  }
  Log(LogLevel::kWarning, Name() + " lost: " + reason);
  CloseOtherHalf(reason);
  session_->Close(cause, reason);
  ShutPaths();
  // A comm made its links on both sides, and takes them out itself.
  const std::shared_ptr<LinkTable> table = table_.lock();
  if (table != nullptr && !asked_here() && comm_name_.empty()) {
    table->Remove(this);
  }
}

void Link::Close(const std::string &reason) {
  if (!MoveTo(LinkState::kClosed, reason)) {
    return;
  }
  CloseOtherHalf(reason);
  session_->Close(CloseCause::kByUs, reason);
  ShutPaths();
}

// Before our own connection ends: the other half would take that for the loss of its peer, and say so in the log.
void Link::CloseOtherHalf(const std::string &reason) {
  if (other_half_ != nullptr) {
    other_half_->Close(reason);
  }
}

void Link::ShutPaths() {
  path_->Close();
  owner_path_->Close();
}

void Link::WaitUntilServed() {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    served_.wait(lock, [this] { return !serving_; });
  }
  owner_path_->Join();
}

bool Link::IsOf(const Incarnation &incarnation, const PeerProcess *process, const LinkToken &token) const {
  const bool same_process = process != nullptr && process_ != nullptr && process_->Alive() &&
                            process->pid() == process_->pid() && process->pid() != 0;
  return incarnation == peer_.incarnation && (same_process || HasToken(token));
}

bool Link::LoseIfGone() {
  if (alive() && session_->Ended()) {
    Lose(CloseCause::kByPeer, "the peer closed the connection");
  }
  return !alive();
}

Status Link::CheckUsable() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  switch (state_) {
    case LinkState::kEstablished:
      return Status::Ok();
    case LinkState::kLost:
      return Status(LLM_FAILED, Name() + " lost: " + end_reason_ + "; unlink or relink");
    case LinkState::kConnecting:
      return Status(LLM_NOT_YET_LINK, Name() + " is just being made");
    case LinkState::kClosed:
      return Status(LLM_NOT_YET_LINK, Name() + " closed: " + end_reason_);
  }
  return Status(LLM_FAILED, Name());
}

// ---- unlink ----

Status Link::Unlink(Deadline deadline) {
  switch (gate_.Enter(deadline)) {
    case EnterResult::kTimeout:
      return Status(LLM_TIMEOUT, Name() + ": a transfer is still running");
    case EnterResult::kShut:
      return Status::Ok();  // the peer, or another caller, is doing it
    case EnterResult::kEntered:
      break;
  }
  // Not held while waiting for the peer: two ends that unlink at once would wait for one another.
  gate_.Shut([] {});
  gate_.Leave();
  const Result<Frame> answer =
      session_->Call(MessageType::kUnlink, Encode(UnlinkRequest{endpoint_->cluster_id(), token_}),
                     MessageType::kUnlinked, deadline);
  if (answer.ok()) {
    return Status::Ok();
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (state_ == LinkState::kClosed) {
      return Status::Ok();  // the peer unlinked at the same time
    }
  }
  Lose(CloseCause::kByUs, "unlink failed: " + answer.status().text());
  const bool timeout = answer.status().code() == LLM_TIMEOUT;
  return Status(timeout ? LLM_TIMEOUT : LLM_UNLINK_FAILED, Name() + ": unlink: " + answer.status().text());
}

void Link::CloseWhenIdle(Deadline deadline, const std::string &reason) {
  if (gate_.Enter(deadline) == EnterResult::kEntered) {
    gate_.Shut([] {});
    gate_.Leave();
  }
  Close(reason);
}

void Link::OnUnlinkedByPeerOnLoop(std::function<void()> done) {
  if (const std::shared_ptr<LinkTable> table = table_.lock()) {
    table->Remove(this);
  }
  gate_.Shut([self = shared_from_this(), done = std::move(done)] {
    // The session stays open for the answer.
    if (self->MoveTo(LinkState::kClosed, "unlinked by the peer")) {
      self->ShutPaths();
    }
    done();
  });
}

Status UnlinkByDialling(const LocalEndpoint &endpoint, const SocketAddress &address, const LinkToken &token,
                        Deadline deadline) {
  const auto failure = [&](const Status &status) {
    const bool timeout = status.code() == LLM_TIMEOUT;
    return Status(timeout ? LLM_TIMEOUT : LLM_UNLINK_FAILED, "unlink at " + address.ToString() + ": " + status.text());
  };
  Result<OpenConnection> connection = DialOpen(address, endpoint.options().trust, deadline);
  if (!connection.ok()) {
    return failure(connection.status());
  }
  FrameSocket &socket = connection.value().socket;
  const UnlinkRequest request{endpoint.cluster_id(), token};
  if (Status sent = SendFrame(socket, MessageType::kUnlink, 1, Encode(request), deadline); !sent.ok()) {
    return failure(sent);
  }
  const Result<Frame> answer =
      RecvFrame(socket, TypeSet(MessageType::kUnlinked, MessageType::kReject), deadline);
  if (!answer.ok()) {
    return failure(answer.status());
  }
  return answer.value().type == MessageType::kReject ? failure(Refusal(answer.value())) : Status::Ok();
}

}  // namespace datadist
