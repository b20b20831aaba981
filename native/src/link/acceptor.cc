#include "link/acceptor.h"

#include <algorithm>
#include <utility>

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_NOT_YET_LINK;

}  // namespace

class Acceptor::LinkVisitor : public Visitor {
 public:
  LinkVisitor(std::shared_ptr<Acceptor> acceptor, const Caller &caller)
      : acceptor_(std::move(acceptor)),
        handshake_(acceptor_->endpoint_, acceptor_->table_, acceptor_->admits_, caller) {
    acceptor_->handshakes_.insert(&handshake_);
  }
  ~LinkVisitor() override { acceptor_->handshakes_.erase(&handshake_); }
  LinkVisitor(const LinkVisitor &) = delete;
  LinkVisitor &operator=(const LinkVisitor &) = delete;

  TypeSet legal() const override { return handshake_.legal(); }
  TypeSet legal_unproven() const override { return TypeSet(MessageType::kAttach); }
  bool greeted() const override { return handshake_.greeted(); }
  bool may_end() const override { return handshake_.may_end(); }
  Status OnFrameOnLoop(const Frame &frame, Visit &visit) override;

 private:
  Status OnHello(const Frame &frame, Visit &visit);
  Status OnReady(const Frame &frame, Visit &visit);
  Status OnAttach(const Frame &frame, Visit &visit);
  Status OnUnlink(const Frame &frame, Visit &visit);
  Status OnEstablished(const Frame &frame, Visit &visit);

  const std::shared_ptr<Acceptor> acceptor_;
  ServerHandshake handshake_;
};

void Acceptor::StartOnLoop(Listeners listeners) {
  // The door holds us, and we hold the door, until StopOnLoop.
  door_ = std::make_shared<FrontDoor>(
      endpoint_->loop(), endpoint_->options().trust,
      [self = shared_from_this()](const Caller &caller) { return std::make_unique<LinkVisitor>(self, caller); });
  door_->StartOnLoop(std::move(listeners));
}

void Acceptor::StopOnLoop() {
  if (const std::shared_ptr<FrontDoor> door = std::exchange(door_, nullptr)) {
    door->StopOnLoop();
  }
}

ServerHandshake *Acceptor::FindOwnerOnLoop(const Attach &attach) const {
  const auto owner = std::find_if(handshakes_.begin(), handshakes_.end(),
                                  [&](const ServerHandshake *handshake) { return handshake->Wants(attach); });
  return owner == handshakes_.end() ? nullptr : *owner;
}

// The answer comes once the transfer that we may be running has ended.
void Acceptor::UnlinkOnLoop(const UnlinkRequest &request, uint64_t visit, uint32_t seq) {
  const auto answer = [weak = weak_from_this(), visit, seq] {
    const std::shared_ptr<Acceptor> self = weak.lock();
    Visit *const waiting = self != nullptr && self->door_ != nullptr ? self->door_->FindOnLoop(visit) : nullptr;
    if (waiting != nullptr) {
      [[maybe_unused]] const Status sent = waiting->Send(MessageType::kUnlinked, seq, {});
    }
  };
  const std::shared_ptr<Link> link = table_->Find(request.cluster_id);
  if (link == nullptr || !link->HasToken(request.token)) {
    answer();  // dropped already, by us or with an earlier life of this process
    return;
  }
  link->OnUnlinkedByPeerOnLoop([loop = endpoint_->loop().get(), answer] { loop->Post(answer); });
}

void Acceptor::AnnounceOnLoop(const Link &link) {
  if (const auto comm = table_->FindCommOnLoop(link.comm_name(), link.peer_id())) {
    comm->OnPeerLinkedOnLoop(link.peer_id());
  }
}

Status Acceptor::LinkVisitor::OnFrameOnLoop(const Frame &frame, Visit &visit) {
  switch (frame.type) {
    case MessageType::kHello:
      return OnHello(frame, visit);
    case MessageType::kReady:
      return OnReady(frame, visit);
    case MessageType::kAttach:
      return OnAttach(frame, visit);
    case MessageType::kUnlink:
      return OnUnlink(frame, visit);
    default:
      return OnEstablished(frame, visit);
  }
}

Status Acceptor::LinkVisitor::OnHello(const Frame &frame, Visit &visit) {
  const Result<std::vector<uint8_t>> welcome = handshake_.OnHello(frame.body, visit.streams());
  if (!welcome.ok()) {
    // A member of a comm that is here before us: it dials again until we are there too.
    if (welcome.status().code() == LLM_NOT_YET_LINK) {
      visit.Answered();
    }
    return visit.Reject(frame.seq, welcome.status());
  }
  visit.GiveTime(handshake_.client_patience());
  return visit.Send(MessageType::kWelcome, frame.seq, welcome.value());
}

Status Acceptor::LinkVisitor::OnReady(const Frame &frame, Visit &visit) {
  const Result<std::vector<uint8_t>> ready = handshake_.OnReady(frame.body);
  return ready.ok() ? visit.Send(MessageType::kReady, frame.seq, ready.value())
                    : visit.Reject(frame.seq, ready.status());
}

Status Acceptor::LinkVisitor::OnAttach(const Frame &frame, Visit &visit) {
  const Result<Attach> attach = Decode<Attach>(frame.body);
  if (!attach.ok()) {
    return attach.status();
  }
  ServerHandshake *const owner = acceptor_->FindOwnerOnLoop(attach.value());
  if (owner == nullptr) {
    return Status(LLM_FAILED, "ATTACH that no link waits for");
  }
  if (Status sent = visit.Send(MessageType::kAttached, frame.seq, {}); !sent.ok()) {
    return sent;
  }
  owner->TakeStream(attach.value(), visit.Take().fd);
  return Status::Ok();
}

Status Acceptor::LinkVisitor::OnUnlink(const Frame &frame, Visit &visit) {
  const Result<UnlinkRequest> request = Decode<UnlinkRequest>(frame.body);
  if (!request.ok()) {
    return request.status();
  }
  visit.Answered();
  acceptor_->UnlinkOnLoop(request.value(), visit.id(), frame.seq);
  return Status::Ok();
}

Status Acceptor::LinkVisitor::OnEstablished(const Frame &frame, Visit &visit) {
  if (Status status = DecodeEmpty(frame.body); !status.ok()) {
    return status;
  }
  const Result<std::shared_ptr<Link>> link = handshake_.Finish(visit.Take());
  if (!link.ok()) {
    return link.status();
  }
  // The link owns the connection and is in the table; the client may use it as soon as it reads the answer.
  link.value()->Establish(frame.seq);
  acceptor_->AnnounceOnLoop(*link.value());
  return Status::Ok();
}

}  // namespace datadist
