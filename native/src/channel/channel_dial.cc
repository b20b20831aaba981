#include "channel/channel_dial.h"

#include <sys/epoll.h>

#include <utility>

#include "channel/messages.h"

namespace datadist {
namespace {

// A full backlog within the host: the kernel has no way to tell when there is room.
constexpr std::chrono::milliseconds kFullPause{5};

}  // namespace

ChannelDial::~ChannelDial() {
  loop_.StopTimerOnLoop(timer_);
  loop_.UnwatchOnLoop(watch_);
  if (connection_ != nullptr) {
    connection_->CloseOnLoop();
  }
}

void ChannelDial::StartOnLoop() { AgainOnLoop(std::chrono::milliseconds::zero()); }

void ChannelDial::AgainOnLoop(std::chrono::milliseconds pause) {
  timer_ = loop_.StartTimerOnLoop(EventLoop::Clock::now() + pause, [this] { TryOnLoop(); });
}

void ChannelDial::EndOnLoop(const Status &why) {
  const Done done = std::move(done_);
  done(why);  // may destroy this
}

void ChannelDial::OnEndedOnLoop(CloseCause cause, const Status &why) {
  cut_ = cause == CloseCause::kByPeer;
  EndOnLoop(why);
}

void ChannelDial::TryOnLoop() {
  LocalStep step = TryLocal(address_);
  if (step.full) {
    AgainOnLoop(kFullPause);
    return;
  }
  if (!step.connection.fd) {
    note_ = std::move(step.connection.note);
    TryTcpOnLoop();
    return;
  }
  connection_ = FrameConnection::OpenOnLoop(loop_, FrameSocket(std::move(step.connection.fd)),
                                            FrameConnection::Reads::kAlways, this);
  GreetOnLoop();
}

void ChannelDial::TryTcpOnLoop() {
  Result<Fd> fd = StartTcp(address_);
  if (!fd.ok()) {
    EndOnLoop(fd.status());
    return;
  }
  connecting_ = std::move(fd).value();
  watch_ = loop_.WatchOnLoop(connecting_.get(), EPOLLOUT, [this](uint32_t) { OnConnectedOnLoop(); });
}

void ChannelDial::OnConnectedOnLoop() {
  loop_.UnwatchOnLoop(watch_);
  Status status = FinishTcp(connecting_.get(), address_);
  if (status.ok()) {
    connection_ = FrameConnection::OpenOnLoop(loop_, FrameSocket(std::move(connecting_)),
                                              FrameConnection::Reads::kAlways, this);
    status = OpenOnLoop();
  }
  if (!status.ok()) {
    EndOnLoop(status);
  }
}

// Over TCP nobody says who is there.
Status ChannelDial::OpenOnLoop() {
  if (IsOpenToAll(trust_)) {
    GreetOnLoop();
    return Status::Ok();
  }
  if (trust_.keys == nullptr) {
    return NotTrusted(note_);
  }
  opening_.emplace(trust_.keys->Keys());
  const Result<std::vector<uint8_t>> open = opening_->Open();
  if (!open.ok()) {
    return open.status();
  }
  connection_->SendOnLoop(MessageType::kOpen, 0, open.value());
  return Status::Ok();
}

void ChannelDial::GreetOnLoop() {
  const ChannelGreeting greeting{{kProtocolVersion, kProtocolVersion}, content_version_};
  connection_->SendOnLoop(MessageType::kChannel, 0, Encode(greeting));
}

TypeSet ChannelDial::LegalOnLoop() const {
  const bool opening = opening_.has_value() && !opened_;
  return TypeSet(opening ? MessageType::kOpened : MessageType::kChannelReady, MessageType::kReject);
}

Status ChannelDial::OnFrameOnLoop(const Frame &frame) {
  switch (frame.type) {
    case MessageType::kOpened:
      return OnOpenedOnLoop(frame);
    case MessageType::kChannelReady:
      return OnReadyOnLoop(frame);
    default:
      return Refusal(frame);
  }
}

Status ChannelDial::OnOpenedOnLoop(const Frame &frame) {
  const Result<std::vector<uint8_t>> proof = opening_->OnOpened(frame.body);
  if (!proof.ok()) {
    return proof.status();
  }
  connection_->SendOnLoop(MessageType::kProve, 0, proof.value());
  const SessionKeys &session = opening_->session();
  connection_->SetSealsOnLoop(FrameSeal(session.to_client), FrameSeal(session.to_server));
  opened_ = true;
  GreetOnLoop();
  return Status::Ok();
}

Status ChannelDial::OnReadyOnLoop(const Frame &frame) {
  if (Status status = DecodeEmpty(frame.body); !status.ok()) {
    return status;
  }
  const std::shared_ptr<FrameConnection> connection = std::move(connection_);
  connection_ = nullptr;
  const Done done = std::move(done_);
  done(connection);  // may destroy this
  return Status::Ok();
}

}  // namespace datadist
