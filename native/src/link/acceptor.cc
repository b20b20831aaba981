#include "link/acceptor.h"

#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <exception>
#include <optional>
#include <utility>

#include "base/socket_io.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_NOT_YET_LINK;

constexpr size_t kMaxIncoming = 64;
constexpr std::chrono::milliseconds kHandshakeTime{5000};
// After accept() found no descriptor or memory: the listener stays readable, and would spin.
constexpr std::chrono::milliseconds kAcceptPause{100};

// Handshake messages are small and strictly alternate, so the socket's buffer has room for each; one that does not fit
// is the fault of a peer that does not read.
Status SendNow(int fd, const std::vector<uint8_t> &bytes) {
  const ssize_t sent = ::send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  return sent == static_cast<ssize_t>(bytes.size()) ? Status::Ok() : Status(LLM_FAILED, "cannot send the answer");
}

}  // namespace

void Acceptor::StartOnLoop(Listeners listeners) {
  WatchOnLoop(tcp_, std::move(listeners.tcp));
  if (listeners.local) {
    WatchOnLoop(local_, std::move(listeners.local));
  }
}

void Acceptor::WatchOnLoop(Listener &listener, Fd fd) {
  listener.fd = std::move(fd);
  listener.watch = endpoint_->loop()->WatchOnLoop(
      listener.fd.get(), EPOLLIN, [self = shared_from_this(), &listener](uint32_t) { self->OnListenerOnLoop(listener); });
}

void Acceptor::StopOnLoop() {
  const std::shared_ptr<Acceptor> self = shared_from_this();  // the handlers being removed may be the last to hold us
  for (Listener *listener : {&tcp_, &local_}) {
    endpoint_->loop()->UnwatchOnLoop(listener->watch);
    endpoint_->loop()->StopTimerOnLoop(listener->pause_timer);
    listener->fd.Reset();
  }
  while (!incoming_.empty()) {
    DropOnLoop(incoming_.begin()->first, "");
  }
}

void Acceptor::OnListenerOnLoop(Listener &listener) {
  while (true) {
    Fd fd(::accept4(listener.fd.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (fd) {
      AdmitOnLoop(std::move(fd));
      continue;
    }
    if (errno == EINTR || errno == ECONNABORTED) {
      continue;
    }
    if (errno != EAGAIN && errno != EWOULDBLOCK) {
      if (log_budget_.Take()) {
        Log(LogLevel::kError, "accept: " + ErrnoText(errno));
      }
      PauseOnLoop(listener);
    }
    return;
  }
}

void Acceptor::PauseOnLoop(Listener &listener) {
  endpoint_->loop()->SetEventsOnLoop(listener.watch, 0);
  listener.pause_timer = endpoint_->loop()->StartTimerOnLoop(
      EventLoop::Clock::now() + kAcceptPause,
      [self = shared_from_this(), &listener] { self->endpoint_->loop()->SetEventsOnLoop(listener.watch, EPOLLIN); });
}

void Acceptor::AdmitOnLoop(Fd fd) {
  if (incoming_.size() >= kMaxIncoming) {
    EvictOnLoop();
  }
  Result<Connection> connection = Identify(std::move(fd));
  if (!connection.ok()) {
    if (log_budget_.Take()) {
      Log(LogLevel::kWarning, "connection refused: " + connection.status().text());
    }
    return;
  }
  auto &[known, process] = connection.value();
  const Key key = ++last_key_;
  std::string peer = process != nullptr ? process->Name() : SocketAddress::PeerOf(known.get()).ToString();
  std::string source = process != nullptr ? peer : peer.substr(0, peer.rfind(':'));  // a host has many ports
  ServerHandshake handshake(endpoint_, table_, admits_, peer, process);
  Incoming &incoming =
      *incoming_
           .emplace(key, std::make_unique<Incoming>(std::move(known), std::move(peer), std::move(source),
                                                    std::move(handshake)))
           .first->second;
  incoming.watch = endpoint_->loop()->WatchOnLoop(
      incoming.fd.get(), EPOLLIN, [self = shared_from_this(), key](uint32_t) { self->OnReadableOnLoop(key); });
  SetDeadlineOnLoop(key, incoming, kHandshakeTime);
}

// Of whoever has the most connections: first one that has said nothing, else the oldest. So nobody keeps all others out,
// silent or greeting.
void Acceptor::EvictOnLoop() {
  std::map<std::string, size_t> counts;
  for (const auto &[key, incoming] : incoming_) {
    ++counts[incoming->source];
  }
  const auto most = std::max_element(counts.begin(), counts.end(),
                                     [](const auto &a, const auto &b) { return a.second < b.second; });
  const auto of_most = [&](const auto &entry) { return entry.second->source == most->first; };
  auto it = std::find_if(incoming_.begin(), incoming_.end(), [&](const auto &entry) {
    return of_most(entry) && !entry.second->handshake.greeted();
  });
  if (it == incoming_.end()) {
    it = std::find_if(incoming_.begin(), incoming_.end(), of_most);
  }
  DropOnLoop(it->first, "too many connections that are not links yet");
}

void Acceptor::SetDeadlineOnLoop(Key key, Incoming &incoming, std::chrono::milliseconds span) {
  endpoint_->loop()->StopTimerOnLoop(incoming.timer);
  incoming.timer = endpoint_->loop()->StartTimerOnLoop(
      EventLoop::Clock::now() + span,
      [self = shared_from_this(), key] { self->DropOnLoop(key, "handshake not finished in time"); });
}

void Acceptor::DropOnLoop(Key key, const std::string &why) {
  const auto it = incoming_.find(key);
  if (it == incoming_.end()) {
    return;
  }
  const bool expected = it->second->answered || it->second->handshake.may_end();
  if (!why.empty() && !expected && log_budget_.Take()) {
    Log(LogLevel::kWarning, "connection of " + it->second->peer + " dropped: " + why);
  }
  endpoint_->loop()->UnwatchOnLoop(it->second->watch);
  endpoint_->loop()->StopTimerOnLoop(it->second->timer);
  incoming_.erase(it);
}

void Acceptor::OnReadableOnLoop(Key key) try {
  bool more = true;
  while (more) {
    const auto it = incoming_.find(key);
    if (it == incoming_.end()) {
      return;  // became a link, or was dropped
    }
    if (Status status = ReadOnLoop(key, *it->second, more); !status.ok()) {
      DropOnLoop(key, status.text());
    }
  }
} catch (const std::exception &) {
  DropOnLoop(key, "");  // no memory for it, nor for a reason
}

Status Acceptor::ReadOnLoop(Key key, Incoming &incoming, bool &more) {
  FrameReader &reader = incoming.reader;
  const ssize_t size = ::recv(incoming.fd.get(), reader.next(), reader.wanted(), MSG_DONTWAIT);
  if (size < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) {
    more = errno == EINTR;
    return Status::Ok();
  }
  if (size <= 0) {
    return Status(LLM_FAILED, size == 0 ? "closed before it was a link" : ErrnoText(errno));
  }
  const TypeSet legal = incoming.answered ? TypeSet() : incoming.handshake.legal();
  Result<std::optional<Frame>> frame = reader.Filled(static_cast<size_t>(size), legal);
  if (!frame.ok()) {
    return frame.status();
  }
  return frame.value().has_value() ? OnFrameOnLoop(key, incoming, *frame.value()) : Status::Ok();
}

Status Acceptor::OnFrameOnLoop(Key key, Incoming &incoming, const Frame &frame) {
  if (frame.type == MessageType::kAttach) {
    return OnAttachOnLoop(key, incoming, frame);
  }
  if (frame.type == MessageType::kUnlink) {
    return OnUnlinkOnLoop(key, incoming, frame);
  }
  if (frame.type == MessageType::kEstablished) {
    return OnEstablishedOnLoop(key, incoming, frame);
  }
  return OnHandshakeOnLoop(key, incoming, frame);
}

Status Acceptor::OnHandshakeOnLoop(Key key, Incoming &incoming, const Frame &frame) {
  const Result<std::vector<uint8_t>> answer = incoming.handshake.OnFrame(frame);
  if (!answer.ok()) {
    [[maybe_unused]] const Status sent =
        SendNow(incoming.fd.get(), EncodeFrame(MessageType::kReject, frame.seq, Encode(Reject{answer.status()})));
    // A member of a comm that is here before us: it dials again until we are there too.
    incoming.answered = answer.status().code() == LLM_NOT_YET_LINK;
    return answer.status();
  }
  if (frame.type == MessageType::kHello) {
    SetDeadlineOnLoop(key, incoming, std::min(kHandshakeTime, incoming.handshake.client_patience()));
  }
  return SendNow(incoming.fd.get(), answer.value());
}

Status Acceptor::OnAttachOnLoop(Key key, Incoming &incoming, const Frame &frame) {
  const Result<Attach> attach = Decode<Attach>(frame.body);
  if (!attach.ok()) {
    return attach.status();
  }
  const auto owner = std::find_if(incoming_.begin(), incoming_.end(), [&](const auto &entry) {
    return entry.second->handshake.Wants(attach.value());
  });
  if (owner == incoming_.end()) {
    return Status(LLM_FAILED, "ATTACH that no link waits for");
  }
  if (Status sent = SendNow(incoming.fd.get(), EncodeFrame(MessageType::kAttached, frame.seq, {})); !sent.ok()) {
    return sent;
  }
  endpoint_->loop()->UnwatchOnLoop(incoming.watch);
  owner->second->handshake.TakeStream(attach.value(), std::move(incoming.fd));
  DropOnLoop(key, "");
  return Status::Ok();
}

Status Acceptor::OnUnlinkOnLoop(Key key, Incoming &incoming, const Frame &frame) {
  const Result<UnlinkRequest> request = Decode<UnlinkRequest>(frame.body);
  if (!request.ok()) {
    return request.status();
  }
  incoming.answered = true;
  const auto answer = [weak = weak_from_this(), key, seq = frame.seq] {
    const std::shared_ptr<Acceptor> self = weak.lock();
    const auto it = self == nullptr ? decltype(incoming_.begin())() : self->incoming_.find(key);
    if (self != nullptr && it != self->incoming_.end()) {
      [[maybe_unused]] const Status sent =
          SendNow(it->second->fd.get(), EncodeFrame(MessageType::kUnlinked, seq, {}));
    }
  };
  const std::shared_ptr<Link> link = table_->Find(request.value().cluster_id);
  if (link == nullptr || !link->HasToken(request.value().token)) {
    answer();  // dropped already, by us or with an earlier life of this process
    return Status::Ok();
  }
  link->OnUnlinkedByPeerOnLoop([loop = endpoint_->loop().get(), answer] { loop->Post(answer); });
  return Status::Ok();
}

Status Acceptor::OnEstablishedOnLoop(Key key, Incoming &incoming, const Frame &frame) {
  if (Status status = DecodeEmpty(frame.body); !status.ok()) {
    return status;
  }
  const int fd = incoming.fd.get();
  endpoint_->loop()->UnwatchOnLoop(incoming.watch);
  const Result<std::shared_ptr<Link>> link = incoming.handshake.Finish(std::move(incoming.fd));
  if (!link.ok()) {
    return link.status();
  }
  // The link owns the descriptor and is in the table; the client may use it as soon as it reads the answer.
  Status sent(LLM_FAILED, "closed before it was established");
  link.value()->Establish([&] { sent = SendNow(fd, EncodeFrame(MessageType::kEstablished, frame.seq, {})); });
  ExpectedComms &comms = table_->expected_comms();
  const uint64_t peer_id = link.value()->peer_id();
  comms.Linked(link.value()->comm_name(), peer_id);
  if (const auto waiter = comms.Find(link.value()->comm_name(), peer_id)) {
    waiter->OnPeerLinkedOnLoop(peer_id);
  }
  DropOnLoop(key, sent.ok() ? "" : sent.text());
  return Status::Ok();
}

}  // namespace datadist
