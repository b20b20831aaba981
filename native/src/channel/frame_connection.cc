#include "channel/frame_connection.h"

#include <sys/epoll.h>
#include <sys/socket.h>

#include <cerrno>
#include <exception>
#include <utility>

#include "base/socket_io.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;

// Then the loop looks after the others: one busy peer must not hold up the rest.
constexpr int kReadsPerTurn = 64;

}  // namespace

std::shared_ptr<FrameConnection> FrameConnection::OpenOnLoop(EventLoop &loop, FrameSocket socket, Reads reads,
                                                             Handler *handler) {
  const std::shared_ptr<FrameConnection> made(new FrameConnection(loop, std::move(socket), reads, handler));
  made->watched_ = EPOLLIN;
  made->watch_ = loop.WatchOnLoop(made->fd_.get(), EPOLLIN, [weak = made->weak_from_this()](uint32_t events) {
    if (const std::shared_ptr<FrameConnection> self = weak.lock()) {
      self->OnEventsOnLoop(events);
    }
  });
  return made;
}

void FrameConnection::SetSealsOnLoop(FrameSeal in, FrameSeal out) {
  reader_.Expect(std::move(in));
  seal_ = std::move(out);
}

void FrameConnection::CloseOnLoop() {
  handler_ = nullptr;
  if (fd_) {
    loop_.UnwatchOnLoop(watch_);
    fd_.Reset();
  }
}

void FrameConnection::EndOnLoop(CloseCause cause, const Status &why) {
  Handler *const handler = handler_;
  CloseOnLoop();
  if (handler != nullptr) {
    handler->OnEndedOnLoop(cause, why);
  }
}

// A broken connection is noticed, with its reason, by the read that the loop makes of it.
void FrameConnection::SendOnLoop(MessageType type, uint32_t seq, const std::vector<uint8_t> &body) {
  if (!fd_) {
    return;
  }
  const std::vector<uint8_t> bytes = EncodeFrame(type, seq, body, &seal_);
  outbox_.insert(outbox_.end(), bytes.begin(), bytes.end());
  FlushOnLoop();
}

void FrameConnection::FlushOnLoop() {
  const size_t sent = SendWithoutWaiting(fd_.get(), outbox_.data(), outbox_.size());
  outbox_.erase(outbox_.begin(), outbox_.begin() + static_cast<std::ptrdiff_t>(sent));
  if (outbox_.empty()) {
    outbox_ = {};  // a large answer is rare, and its memory is not to stay
  }
  const uint32_t events = (WantsFrames() ? static_cast<uint32_t>(EPOLLIN) : 0U) |
                          (outbox_.empty() ? 0U : static_cast<uint32_t>(EPOLLOUT));
  if (events != watched_) {
    watched_ = events;
    loop_.SetEventsOnLoop(watch_, events);
  }
  NoteProgressOnLoop(outbox_.empty());
}

// `moved`: a whole frame has come in, or all that was sent has been read. A byte now and then is no progress.
void FrameConnection::NoteProgressOnLoop(bool moved) {
  const bool stuck = !reader_.AtBoundary() || !outbox_.empty();
  if (!stuck) {
    stuck_since_.reset();
  } else if (moved || !stuck_since_.has_value()) {
    stuck_since_ = EventLoop::Clock::now();
  }
}

// Without memory for what the peer sends its framing is lost.
void FrameConnection::OnEventsOnLoop(uint32_t events) try {
  if ((events & EPOLLOUT) != 0) {
    FlushOnLoop();
  }
  if ((events & (EPOLLERR | EPOLLHUP)) != 0 && !WantsFrames()) {
    EndOnLoop(CloseCause::kByPeer, Status(LLM_FAILED, "the peer closed the connection"));
    return;
  }
  for (int i = 0; i < kReadsPerTurn && fd_ && WantsFrames() && ReadOnLoop(); ++i) {
  }
} catch (const std::exception &) {
  EndOnLoop(CloseCause::kProtocol, Status(LLM_FAILED, "out of memory"));
}

// Whether there may be more to read.
bool FrameConnection::ReadOnLoop() {
  const ssize_t size = ::recv(fd_.get(), reader_.next(), reader_.wanted(), MSG_DONTWAIT);
  if (size < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) {
    return errno == EINTR;
  }
  if (size <= 0) {
    EndOnLoop(CloseCause::kByPeer, Status(LLM_FAILED, size == 0 ? "the peer closed the connection" : ErrnoText(errno)));
    return false;
  }
  Result<std::optional<Frame>> frame = reader_.Filled(static_cast<size_t>(size), handler_->LegalOnLoop());
  if (!frame.ok()) {
    EndOnLoop(CloseCause::kProtocol, Status(LLM_FAILED, "protocol error: " + frame.status().text()));
    return false;
  }
  NoteProgressOnLoop(frame.value().has_value());
  if (frame.value().has_value()) {
    if (const Status status = handler_->OnFrameOnLoop(*frame.value()); !status.ok()) {
      EndOnLoop(CloseCause::kProtocol, status);
    }
  }
  return true;
}

}  // namespace datadist
