#include "control/front_door.h"

#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <exception>
#include <utility>

#include "base/socket_io.h"
#include "control/messages.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_LINK_FAILED;

constexpr size_t kMaxVisits = 64;
constexpr std::chrono::milliseconds kVisitTime{5000};
// After accept() found no descriptor or memory: the listener stays readable, and would spin.
constexpr std::chrono::milliseconds kAcceptPause{100};

}  // namespace

Status Visit::Send(MessageType type, uint32_t seq, const std::vector<uint8_t> &body) {
  const std::vector<uint8_t> bytes = EncodeFrame(type, seq, body, &socket_.out);
  const ssize_t sent = ::send(socket_.fd.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  return sent == static_cast<ssize_t>(bytes.size()) ? Status::Ok() : Status(LLM_FAILED, "cannot send the answer");
}

Status Visit::Reject(uint32_t seq, const Status &why) {
  // The caller may be gone: then nobody is left to be told.
  [[maybe_unused]] const Status sent = Send(MessageType::kReject, seq, Encode(datadist::Reject{why}));
  return why;
}

FrameSocket Visit::Take() {
  taken_ = true;
  loop_.UnwatchOnLoop(watch_);
  socket_.in = reader_.seal();
  return std::move(socket_);
}

void FrontDoor::StartOnLoop(Listeners listeners) {
  WatchOnLoop(tcp_, std::move(listeners.tcp));
  if (listeners.local) {
    WatchOnLoop(local_, std::move(listeners.local));
  }
}

void FrontDoor::WatchOnLoop(Listener &listener, Fd fd) {
  listener.fd = std::move(fd);
  listener.watch = loop_->WatchOnLoop(listener.fd.get(), EPOLLIN, [self = shared_from_this(), &listener](uint32_t) {
    self->OnListenerOnLoop(listener);
  });
}

void FrontDoor::StopOnLoop() {
  const std::shared_ptr<FrontDoor> self = shared_from_this();  // the handlers being removed may be the last to hold us
  for (Listener *listener : {&tcp_, &local_}) {
    loop_->UnwatchOnLoop(listener->watch);
    loop_->StopTimerOnLoop(listener->pause_timer);
    listener->fd.Reset();
  }
  while (!visits_.empty()) {
    DropOnLoop(visits_.begin()->first, "");
  }
}

Visit *FrontDoor::FindOnLoop(uint64_t id) {
  const auto it = visits_.find(id);
  return it == visits_.end() ? nullptr : it->second.get();
}

void FrontDoor::OnListenerOnLoop(Listener &listener) {
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

void FrontDoor::PauseOnLoop(Listener &listener) {
  loop_->SetEventsOnLoop(listener.watch, 0);
  listener.pause_timer = loop_->StartTimerOnLoop(
      EventLoop::Clock::now() + kAcceptPause,
      [self = shared_from_this(), &listener] { self->loop_->SetEventsOnLoop(listener.watch, EPOLLIN); });
}

void FrontDoor::AdmitOnLoop(Fd fd) {
  if (visits_.size() >= kMaxVisits) {
    EvictOnLoop();
  }
  Result<Connection> connection = Identify(std::move(fd));
  if (!connection.ok()) {
    if (log_budget_.Take()) {
      Log(LogLevel::kWarning, "connection refused: " + connection.status().text());
    }
    return;
  }
  auto &[known, process, note] = connection.value();
  const std::string name = process != nullptr ? process->Name() : SocketAddress::PeerOf(known.get()).ToString();
  const std::string source = process != nullptr ? name : name.substr(0, name.rfind(':'));  // a host has many ports
  const uint64_t id = ++last_id_;
  auto made = std::make_unique<Visit>(*loop_, id, Caller{name, source, process, false}, std::move(known));
  made->visitor_ = receive_(made->caller());
  Visit &visit = *visits_.emplace(id, std::move(made)).first->second;
  visit.watch_ = loop_->WatchOnLoop(visit.socket_.fd.get(), EPOLLIN,
                                    [self = shared_from_this(), id](uint32_t) { self->OnReadableOnLoop(id); });
  SetDeadlineOnLoop(visit, kVisitTime);
}

// Of whoever has the most connections: first one that has said nothing, else the oldest. So nobody keeps all others out,
// silent or greeting.
void FrontDoor::EvictOnLoop() {
  std::map<std::string, size_t> counts;
  for (const auto &[id, visit] : visits_) {
    ++counts[visit->caller().source];
  }
  const auto most = std::max_element(counts.begin(), counts.end(),
                                     [](const auto &a, const auto &b) { return a.second < b.second; });
  const auto of_most = [&](const auto &entry) { return entry.second->caller().source == most->first; };
  auto it = std::find_if(visits_.begin(), visits_.end(),
                         [&](const auto &entry) { return of_most(entry) && !entry.second->visitor_->greeted(); });
  if (it == visits_.end()) {
    it = std::find_if(visits_.begin(), visits_.end(), of_most);
  }
  DropOnLoop(it->first, "too many connections at once");
}

void FrontDoor::SetDeadlineOnLoop(Visit &visit, std::chrono::milliseconds span) {
  loop_->StopTimerOnLoop(visit.timer_);
  visit.timer_ = loop_->StartTimerOnLoop(
      EventLoop::Clock::now() + std::min(span, kVisitTime),
      [self = shared_from_this(), id = visit.id()] { self->DropOnLoop(id, "handshake not finished in time"); });
}

void FrontDoor::DropOnLoop(uint64_t id, const std::string &why) {
  const auto it = visits_.find(id);
  if (it == visits_.end()) {
    return;
  }
  const bool expected = it->second->answered_ || it->second->visitor_->may_end();
  if (!why.empty() && !expected && log_budget_.Take()) {
    Log(LogLevel::kWarning, "connection of " + it->second->caller().name + " dropped: " + why);
  }
  loop_->UnwatchOnLoop(it->second->watch_);
  loop_->StopTimerOnLoop(it->second->timer_);
  visits_.erase(it);
}

void FrontDoor::OnReadableOnLoop(uint64_t id) try {
  bool more = true;
  while (more) {
    Visit *const visit = FindOnLoop(id);
    if (visit == nullptr) {
      return;  // was dropped
    }
    const Status status = ReadOnLoop(*visit, more);
    if (!status.ok() || visit->taken_) {
      DropOnLoop(id, status.text());
    }
  }
} catch (const std::exception &) {
  DropOnLoop(id, "");  // no memory for it, nor for a reason
}

Status FrontDoor::ReadOnLoop(Visit &visit, bool &more) {
  FrameReader &reader = visit.reader_;
  const ssize_t size = ::recv(visit.socket_.fd.get(), reader.next(), reader.wanted(), MSG_DONTWAIT);
  if (size < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) {
    more = errno == EINTR;
    return Status::Ok();
  }
  if (size <= 0) {
    return Status(LLM_FAILED, size == 0 ? "closed before it was a link" : ErrnoText(errno));
  }
  Result<std::optional<Frame>> frame = reader.Filled(static_cast<size_t>(size), LegalOnLoop(visit));
  if (!frame.ok()) {
    return frame.status();
  }
  if (!frame.value().has_value()) {
    return Status::Ok();
  }
  const Status status = OnFrameOnLoop(visit, *frame.value());
  if (const auto span = std::exchange(visit.time_, std::nullopt)) {
    SetDeadlineOnLoop(visit, *span);
  }
  return status;
}

// A key is asked of whom the kernel does not name; without one, everybody is let in or nobody.
TypeSet FrontDoor::LegalOnLoop(const Visit &visit) const {
  if (visit.answered_) {
    return TypeSet();
  }
  if (visit.opening_.has_value() && !visit.caller().knows_key) {
    return TypeSet(MessageType::kProve);
  }
  TypeSet legal = visit.visitor_->legal();
  if (!visit.caller().IsKnown()) {
    legal.Add(MessageType::kOpen);  // where it is not wanted it is told so
  }
  return legal;
}

Status FrontDoor::OnFrameOnLoop(Visit &visit, const Frame &frame) {
  if (frame.type == MessageType::kOpen) {
    return OnOpenOnLoop(visit, frame);
  }
  if (frame.type == MessageType::kProve) {
    return OnProveOnLoop(visit, frame);
  }
  const bool known = visit.caller().IsKnown() || IsOpenToAll(trust_);
  if (!known && !visit.visitor_->legal_unproven().Has(frame.type)) {
    return visit.Reject(frame.seq, trust_.keys != nullptr
                                       ? Status(LLM_LINK_FAILED, "a key (auth) is asked for, and the peer has none")
                                       : NotTrusted(""));
  }
  return visit.visitor_->OnFrameOnLoop(frame, visit);
}

Status FrontDoor::OnOpenOnLoop(Visit &visit, const Frame &frame) {
  if (trust_.keys == nullptr) {
    return visit.Reject(frame.seq, trust_.insecure ? Status(LLM_LINK_FAILED, "there is no key (auth) at this end")
                                                   : NotTrusted(""));
  }
  visit.opening_.emplace(trust_.keys->Keys());
  const Result<std::vector<uint8_t>> opened = visit.opening_->OnOpen(frame.body);
  if (!opened.ok()) {
    return visit.Reject(frame.seq, opened.status());
  }
  return visit.Send(MessageType::kOpened, frame.seq, opened.value());
}

Status FrontDoor::OnProveOnLoop(Visit &visit, const Frame &frame) {
  if (Status status = visit.opening_->OnProve(frame.body); !status.ok()) {
    return status;
  }
  const SessionKeys &session = visit.opening_->session();
  visit.reader_.Expect(FrameSeal(session.to_server));
  visit.socket_.out = FrameSeal(session.to_client);
  visit.streams_ = session.streams;
  visit.caller_.knows_key = true;
  return Status::Ok();
}

}  // namespace datadist
