#include "transport/tcp/connection.h"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace datadist {
namespace {

using std::chrono::milliseconds;

// One turn: some hundred microseconds of copying. Spans of a few bytes make it end by calls.
constexpr uint64_t kTurnBytes = 1 << 20;
constexpr size_t kTurnCalls = 32;

// So much of the end of a pull goes out from a copy, after the pin: a small pull in one call, whose copy costs little.
constexpr uint64_t kTailBytes = 16 << 10;

// The pin of what a request names, with every span checked against it.
Result<CachePin> PinRequested(RegionTable &regions, uint64_t peer, const RequestHeader &header,
                              const std::vector<Span> &spans) {
  const PeerRequest request{peer, header.op == DataOp::kPull ? PeerUse::kRead : PeerUse::kWrite,
                            {header.first_tensor, header.tensor_count}, spans};
  Result<CachePin> pin = regions.PinForPeer(header.cache_id, header.generation, request);
  if (!pin.ok()) {
    return pin;
  }
  const uint64_t last_tensor = uint64_t{header.first_tensor} + header.tensor_count - 1;
  for (const Span &span : spans) {
    if (const auto range = pin.value().Resolve(last_tensor, span.offset, span.length); !range.ok()) {
      return range.status();
    }
  }
  return pin;
}

std::vector<uint8_t> Encoded(const Status &status, uint64_t total_bytes) {
  Writer response;
  EncodeResponse(status, total_bytes, response);
  return response.Take();
}

}  // namespace

TcpConnection::TcpConnection(int fd, std::shared_ptr<RegionTable> regions, uint64_t peer, milliseconds max_request)
    : fd_(fd), regions_(std::move(regions)), peer_(peer), max_request_(max_request) {}

TcpConnection::Next TcpConnection::Serve() {
  calls_left_ = kTurnCalls;
  bytes_left_ = kTurnBytes;
  while (true) {
    if (deadline_.has_value() && deadline_->Expired()) {
      return Next::kEnd;
    }
    if (const std::optional<Next> next = Step()) {
      return *next;
    }
    if (calls_left_ == 0 || bytes_left_ == 0) {
      return phase_ == Phase::kAnswer ? Next::kWrite : Next::kRead;
    }
  }
}

std::optional<TcpConnection::Next> TcpConnection::Step() {
  switch (phase_) {
    case Phase::kHeader:
      return ReadHeader();
    case Phase::kSpans:
      return ReadSpans();
    case Phase::kAnswer:
      return WriteAnswer();
    case Phase::kBytesIn:
      return ReadBytes();
  }
  return Next::kEnd;
}

std::optional<TcpConnection::Next> TcpConnection::ReadHeader() {
  size_t moved = 0;
  if (const auto next = Receive(head_.data() + filled_, head_.size() - filled_, moved)) {
    return next;
  }
  if (!deadline_.has_value()) {
    deadline_ = Deadline::In(max_request_);
  }
  filled_ += moved;
  if (filled_ < head_.size()) {
    return std::nullopt;
  }
  const Result<RequestHeader> header = DecodeRequestHeader(head_.data());
  if (!header.ok()) {
    return Next::kEnd;
  }
  header_ = header.value();
  deadline_ = Deadline::Earlier(*deadline_, Deadline::In(milliseconds(header_.remaining_ms)));
  filled_ = 0;
  phase_ = Phase::kSpans;
  return std::nullopt;
}

std::optional<TcpConnection::Next> TcpConnection::ReadSpans() {
  constexpr size_t kFirst = 4096;
  const size_t size = header_.span_count * kSpanBytes;
  if (filled_ == list_.size()) {
    list_.resize(std::min(size, std::max(kFirst, 2 * filled_)));
  }
  size_t moved = 0;
  if (const auto next = Receive(list_.data() + filled_, list_.size() - filled_, moved)) {
    return next;
  }
  filled_ += moved;
  if (filled_ < size) {
    return std::nullopt;
  }
  Result<std::vector<Span>> spans = DecodeSpans(list_.data(), header_);
  if (!spans.ok()) {
    return Next::kEnd;
  }
  spans_ = std::move(spans).value();
  std::vector<uint8_t>().swap(list_);
  filled_ = 0;
  Answer();
  return std::nullopt;
}

// Says whether the request is served, and a pull's bytes follow.
void TcpConnection::Answer() {
  Result<CachePin> pin = PinRequested(*regions_, peer_, header_, spans_);
  answer_ = Encoded(pin.ok() ? Status::Ok() : pin.status(), header_.total_bytes);
  answered_ = 0;
  phase_ = Phase::kAnswer;
  if (pin.ok()) {
    pin_ = std::move(pin).value();
    cursor_.emplace(header_.first_tensor, header_.tensor_count, spans_);
  }
}

std::optional<TcpConnection::Next> TcpConnection::WriteAnswer() {
  const bool pull = header_.op == DataOp::kPull;
  if (pull && pin_ && cursor_->left() <= kTailBytes && !TakeTail()) {
    return Next::kEnd;
  }
  if (answered_ == answer_.size()) {
    return WriteBytes();
  }
  Chunk chunk;
  chunk.Add(answer_.data() + answered_, answer_.size() - answered_);
  size_t moved = 0;
  if (const auto next = Move(chunk, Next::kWrite, moved)) {
    return next;
  }
  answered_ += moved;
  if (answered_ < answer_.size() || (pull && pin_)) {
    return std::nullopt;
  }
  if (pin_) {  // "go"
    phase_ = Phase::kBytesIn;
    return std::nullopt;
  }
  EndRequest();
  return Next::kRead;
}

// Not in one call with the answer: bytes that lie 20 off in the kernel's pages are a sixth dearer to copy, on both ends.
std::optional<TcpConnection::Next> TcpConnection::WriteBytes() {
  Chunk chunk;
  if (!cursor_->Gather(spans_, pin_, cursor_->left() - kTailBytes, chunk).ok()) {
    return Next::kEnd;
  }
  size_t moved = 0;
  if (const auto next = Move(chunk, Next::kWrite, moved)) {
    return next;
  }
  cursor_->Advance(spans_, moved);
  return std::nullopt;
}

// The end of a pull goes behind the answer, and the cache is let go of before the peer has the last byte: who has been
// told that a pull is complete may free the cache, and finds its memory free.
bool TcpConnection::TakeTail() {
  answer_.reserve(answer_.size() + cursor_->left());
  while (!cursor_->AtEnd()) {
    Chunk chunk;
    if (!cursor_->Gather(spans_, pin_, cursor_->left(), chunk).ok()) {
      return false;
    }
    for (size_t i = 0; i < chunk.count; ++i) {
      const auto *const bytes = static_cast<const uint8_t *>(chunk.iov[i].iov_base);
      answer_.insert(answer_.end(), bytes, bytes + chunk.iov[i].iov_len);
    }
    cursor_->Advance(spans_, chunk.bytes);
  }
  pin_ = CachePin();
  return true;
}

std::optional<TcpConnection::Next> TcpConnection::ReadBytes() {
  Chunk chunk;
  if (!cursor_->Gather(spans_, pin_, cursor_->left(), chunk).ok()) {
    return Next::kEnd;
  }
  size_t moved = 0;
  if (const auto next = Move(chunk, Next::kRead, moved)) {
    return next;
  }
  cursor_->Advance(spans_, moved);
  if (cursor_->AtEnd()) {
    pin_ = CachePin();  // before "done": who was told may unregister at once
    answer_ = Encoded(Status::Ok(), header_.total_bytes);
    answered_ = 0;
    phase_ = Phase::kAnswer;
  }
  return std::nullopt;
}

std::optional<TcpConnection::Next> TcpConnection::Receive(void *data, size_t size, size_t &moved) {
  Chunk chunk;
  chunk.Add(data, size);
  return Move(chunk, Next::kRead, moved);
}

std::optional<TcpConnection::Next> TcpConnection::Move(Chunk &chunk, Next direction, size_t &moved) {
  --calls_left_;
  msghdr message{};
  message.msg_iov = chunk.iov;
  message.msg_iovlen = chunk.count;
  const ssize_t result = direction == Next::kWrite ? ::sendmsg(fd_, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
                                                   : ::recvmsg(fd_, &message, MSG_DONTWAIT);
  if (result < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) {
    return direction;
  }
  if (result <= 0) {
    return Next::kEnd;
  }
  moved = static_cast<size_t>(result);
  bytes_left_ -= std::min<uint64_t>(moved, bytes_left_);
  return std::nullopt;
}

void TcpConnection::EndRequest() {
  phase_ = Phase::kHeader;
  deadline_.reset();
  cursor_.reset();
  std::vector<Span>().swap(spans_);
  std::vector<uint8_t>().swap(answer_);
}

}  // namespace datadist
