#include "transport/tcp/stream.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <algorithm>

#include "base/socket_io.h"

namespace datadist {
namespace {

// A peer that acknowledges nothing for so long is given up by the kernel, whoever still waits.
constexpr unsigned kUserTimeoutMs = 20'000;

}  // namespace

SpanCursor::SpanCursor(uint32_t first_tensor, uint32_t tensor_count, const std::vector<Span> &spans)
    : tensor_(first_tensor) {
  for (const Span &span : spans) {
    left_ += span.length;
  }
  left_ *= tensor_count;
}

Status SpanCursor::Gather(const std::vector<Span> &spans, const CachePin &pin, uint64_t most, Chunk &chunk) const {
  most = std::min(most, left_);
  uint64_t tensor = tensor_;
  size_t index = span_;
  uint64_t offset = offset_;
  while (most > 0 && !chunk.Full()) {
    const Span &span = spans[index];
    const uint64_t length = std::min({span.length - offset, most, Chunk::kMostBytes - chunk.bytes});
    const auto resolved = pin.Resolve(tensor, span.offset + offset, length);
    if (!resolved.ok()) {
      return resolved.status();
    }
    chunk.Add(resolved.value(), length);
    most -= length;
    offset += length;
    if (offset == span.length) {
      offset = 0;
      if (++index == spans.size()) {
        index = 0;
        ++tensor;
      }
    }
  }
  return Status::Ok();
}

void SpanCursor::Advance(const std::vector<Span> &spans, uint64_t bytes) {
  left_ -= bytes;
  offset_ += bytes;
  while (offset_ >= spans[span_].length) {
    offset_ -= spans[span_].length;
    if (++span_ == spans.size()) {
      span_ = 0;
      ++tensor_;
    }
  }
}

Status StreamSpans(int fd, StreamDirection direction, const CachePin &pin, uint32_t first_tensor,
                   uint32_t tensor_count, const std::vector<Span> &spans, Deadline deadline) {
  SpanCursor cursor(first_tensor, tensor_count, spans);
  while (!cursor.AtEnd()) {
    Chunk chunk;
    if (Status status = cursor.Gather(spans, pin, cursor.left(), chunk); !status.ok()) {
      return status;
    }
    const bool sending = direction == StreamDirection::kSend;
    if (Status status = sending ? SendVec(fd, chunk.iov, chunk.count, deadline)
                                : RecvVec(fd, chunk.iov, chunk.count, deadline);
        !status.ok()) {
      return status;
    }
    cursor.Advance(spans, chunk.bytes);
  }
  return Status::Ok();
}

void TuneStream(int fd) {
  const int on = 1;
  (void)::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  (void)::setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &kUserTimeoutMs, sizeof(kUserTimeoutMs));
}

}  // namespace datadist
