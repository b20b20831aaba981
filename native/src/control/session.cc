#include "control/session.h"

#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <cerrno>
#include <exception>
#include <utility>

#include "base/socket_io.h"
#include "control/messages.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_TIMEOUT;

constexpr uint32_t kIntervalsUntilLost = 3;
// More than any exchange needs. A peer that lets more pile up does not read, and is cut off.
constexpr size_t kMaxOutbox = 4U << 20;
// Then the loop looks after the others: one busy peer must not hold up the rest.
constexpr int kReadsPerTurn = 64;

constexpr TypeSet kRequests(MessageType::kPing, MessageType::kDescribe, MessageType::kPush, MessageType::kDigest,
                            MessageType::kConsume, MessageType::kUnlink);
constexpr TypeSet kUnasked(MessageType::kPing, MessageType::kPong, MessageType::kDescribe, MessageType::kPush,
                           MessageType::kDigest, MessageType::kConsume, MessageType::kUnlink);

}  // namespace

std::shared_ptr<Session> Session::Create(std::shared_ptr<EventLoop> loop, FrameSocket socket,
                                         std::chrono::milliseconds heartbeat_interval) {
  return std::shared_ptr<Session>(new Session(std::move(loop), std::move(socket), heartbeat_interval));
}

Session::Session(std::shared_ptr<EventLoop> loop, FrameSocket socket, std::chrono::milliseconds heartbeat_interval)
    : loop_(std::move(loop)),
      fd_(std::move(socket.fd)),
      heartbeat_interval_(heartbeat_interval),
      seal_(std::move(socket.out)),
      reader_(std::move(socket.in)) {}

void Session::Start(std::weak_ptr<SessionHandler> handler) {
  loop_->Post([self = shared_from_this(), handler = std::move(handler)] {
    self->handler_ = handler;
    self->StartOnLoop();
  });
}

void Session::StartOnLoop() {
  bool writable = false;
  bool closed = false;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    writable = want_writable_;
    closed = closed_;
  }
  if (closed) {
    FinishOnLoop();
    return;
  }
  const uint32_t events = EPOLLIN | EPOLLRDHUP | (writable ? static_cast<uint32_t>(EPOLLOUT) : 0U);
  watch_ = loop_->WatchOnLoop(fd_.get(), events, [self = shared_from_this()](uint32_t ready) {
    self->OnEventsOnLoop(ready);
  });
  heartbeat_timer_ = loop_->StartTimerOnLoop(EventLoop::Clock::now() + heartbeat_interval_,
                                             [self = shared_from_this()] { self->OnHeartbeatOnLoop(); });
}

Result<Frame> Session::Call(MessageType request, const std::vector<uint8_t> &body, MessageType answer,
                            Deadline deadline) {
  uint32_t seq = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    seq = ++last_seq_;
    pending_.emplace(seq, PendingCall{answer, std::nullopt});
  }
  Send(request, seq, body);
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_until(lock, deadline.at(), [&] { return closed_ || pending_.at(seq).frame.has_value(); });
  PendingCall &call = pending_.at(seq);
  if (call.frame.has_value()) {
    return *std::move(pending_.extract(seq).mapped().frame);
  }
  if (closed_) {
    return Status(LLM_FAILED, reason_);
  }
  call.given_up = true;  // its answer may still come
  return Status(LLM_TIMEOUT, std::string("no answer to ") + MessageName(request) + " in time");
}

void Session::Send(MessageType type, uint32_t seq, const std::vector<uint8_t> &body) {
  bool overflow = false;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) {
      return;
    }
    const std::vector<uint8_t> bytes = EncodeFrame(type, seq, body, &seal_);  // sealed in the order of sending
    overflow = outbox_.size() + bytes.size() > kMaxOutbox;
    if (!overflow) {
      outbox_.insert(outbox_.end(), bytes.begin(), bytes.end());
      FlushLocked();
    }
  }
  if (overflow) {
    Close(CloseCause::kProtocol, "the peer does not read what it is sent");
  }
}

// Straight from the caller's thread: a hand-over to the loop would cost every request a wake-up more. What the socket
// does not take waits for the loop.
void Session::FlushLocked() {
  const size_t sent = SendWithoutWaiting(fd_.get(), outbox_.data(), outbox_.size());
  outbox_.erase(outbox_.begin(), outbox_.begin() + static_cast<std::ptrdiff_t>(sent));
  const bool want = !outbox_.empty();
  if (want != want_writable_) {
    want_writable_ = want;
    loop_->Post([self = shared_from_this(), want] {
      self->loop_->SetEventsOnLoop(self->watch_,
                                   EPOLLIN | EPOLLRDHUP | (want ? static_cast<uint32_t>(EPOLLOUT) : 0U));
    });
  }
}

bool Session::Ended() const {
  pollfd end{fd_.get(), POLLRDHUP, 0};
  return ::poll(&end, 1, 0) > 0 && (end.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
}

void Session::Close(CloseCause cause, const std::string &reason) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) {
      return;
    }
    closed_ = true;
    cause_ = cause;
    reason_ = reason;
    // The peer learns it now; the descriptor itself stays until nobody can be using its number any more.
    ::shutdown(fd_.get(), SHUT_RDWR);
    changed_.notify_all();
  }
  loop_->Post([self = shared_from_this()] { self->FinishOnLoop(); });
}

void Session::FinishOnLoop() {
  loop_->UnwatchOnLoop(watch_);
  loop_->StopTimerOnLoop(heartbeat_timer_);
  if (const std::shared_ptr<SessionHandler> handler = handler_.lock()) {
    handler_.reset();
    handler->OnClosedOnLoop(cause_, reason_);
  }
}

// Without memory for what the peer sends, this session ends: its bytes are lost, and so is its framing. Shutting down
// needs none; the end of the connection then comes as an event.
void Session::OnEventsOnLoop(uint32_t events) try {
  if ((events & EPOLLOUT) != 0) {
    const std::lock_guard<std::mutex> lock(mutex_);
    FlushLocked();
  }
  if ((events & ~static_cast<uint32_t>(EPOLLOUT)) != 0) {
    for (int i = 0; i < kReadsPerTurn && ReadOnLoop(); ++i) {
    }
  }
} catch (const std::exception &) {
  ::shutdown(fd_.get(), SHUT_RDWR);
}

// Whether there may be more to read.
bool Session::ReadOnLoop() {
  const ssize_t size = ::recv(fd_.get(), reader_.next(), reader_.wanted(), MSG_DONTWAIT);
  if (size < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
    return false;
  }
  if (size < 0 && errno == EINTR) {
    return true;
  }
  if (size <= 0) {
    Close(CloseCause::kByPeer, size == 0 ? "the peer closed the connection" : ErrnoText(errno));
    return false;
  }
  Result<std::optional<Frame>> frame = reader_.Filled(static_cast<size_t>(size), LegalOnLoop());
  Status status = frame.ok() ? Status::Ok() : frame.status();
  if (frame.ok() && frame.value().has_value()) {
    silent_intervals_ = 0;  // a whole frame: a byte now and then is no sign of life
    status = OnFrameOnLoop(*std::move(frame).value());
  }
  if (!status.ok()) {
    Close(CloseCause::kProtocol, "protocol error: " + status.text());
    return false;
  }
  return true;
}

// Answers are legal while somebody asked: of those that nobody did, not even the bytes are taken in.
TypeSet Session::LegalOnLoop() {
  TypeSet legal = kUnasked;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto &[seq, call] : pending_) {
    legal.Add(call.answer);
  }
  return legal;
}

Status Session::OnFrameOnLoop(Frame frame) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) {
      return Status::Ok();
    }
  }
  if (!kRequests.Has(frame.type)) {
    return OnAnswerOnLoop(std::move(frame));
  }
  if (frame.type == MessageType::kPing) {
    const Status status = DecodeEmpty(frame.body);
    if (status.ok()) {
      Send(MessageType::kPong, frame.seq, {});
    }
    return status;
  }
  const std::shared_ptr<SessionHandler> handler = handler_.lock();
  return handler ? handler->OnRequestOnLoop(frame) : Status(LLM_FAILED, "request after the end of the link");
}

Status Session::OnAnswerOnLoop(Frame frame) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (frame.type == MessageType::kPong) {
    return DecodeEmpty(frame.body);
  }
  const auto it = pending_.find(frame.seq);
  if (it == pending_.end() || it->second.frame.has_value()) {
    return Status(LLM_FAILED, std::string("unasked ") + MessageName(frame.type));
  }
  if (it->second.answer != frame.type) {
    return Status(LLM_FAILED, std::string(MessageName(frame.type)) + " instead of " + MessageName(it->second.answer));
  }
  if (it->second.given_up) {
    pending_.erase(it);
    return Status::Ok();
  }
  it->second.frame = std::move(frame);
  changed_.notify_all();
  return Status::Ok();
}

void Session::OnHeartbeatOnLoop() {
  if (silent_intervals_ >= kIntervalsUntilLost) {
    Close(CloseCause::kSilent, "the peer was silent for " +
                                   std::to_string(heartbeat_interval_.count() * kIntervalsUntilLost) + " ms");
    return;
  }
  ++silent_intervals_;
  Send(MessageType::kPing, 0, {});
  heartbeat_timer_ = loop_->StartTimerOnLoop(EventLoop::Clock::now() + heartbeat_interval_,
                                             [self = shared_from_this()] { self->OnHeartbeatOnLoop(); });
}

}  // namespace datadist
