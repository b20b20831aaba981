#include "transport/tcp/stream.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "base/socket_io.h"

namespace datadist {
namespace {

// One system call's share: larger ones fill the socket buffer beyond what the peer drains meanwhile, smaller ones pay
// for more calls. 256 KiB to 1 MiB measure alike.
constexpr uint64_t kChunkBytes = 512 << 10;
constexpr size_t kChunkIovecs = 1024;

// So much of the end of a pull goes out from a copy, after the pin: a small pull in one call, whose copy costs little.
constexpr uint64_t kTailBytes = 16 << 10;

// A peer that acknowledges nothing for so long is given up by the kernel, whoever still waits.
constexpr unsigned kUserTimeoutMs = 20'000;

class Chunk {
 public:
  bool Full() const { return count_ == iov_.size() || bytes_ == kChunkBytes; }
  uint64_t RoomBytes() const { return kChunkBytes - bytes_; }

  void Add(std::byte *base, uint64_t length) {
    bytes_ += length;
    if (count_ > 0) {
      iovec &last = iov_[count_ - 1];
      if (static_cast<std::byte *>(last.iov_base) + last.iov_len == base) {
        last.iov_len += length;
        return;
      }
    }
    iov_[count_++] = {base, length};
  }

  // A copy of its last bytes, which leave it.
  std::vector<std::byte> TakeTail() {
    std::vector<std::byte> tail(std::min(bytes_, kTailBytes));
    for (uint64_t left = tail.size(); left > 0;) {
      iovec &last = iov_[count_ - 1];
      const uint64_t length = std::min<uint64_t>(left, last.iov_len);
      left -= length;
      last.iov_len -= length;
      std::memcpy(tail.data() + left, static_cast<std::byte *>(last.iov_base) + last.iov_len, length);
      count_ -= last.iov_len == 0 ? 1 : 0;
    }
    bytes_ -= tail.size();
    return tail;
  }

  Status Move(int fd, StreamDirection direction, Deadline deadline) {
    const size_t count = std::exchange(count_, 0);
    bytes_ = 0;
    return direction == StreamDirection::kSend ? SendVec(fd, iov_.data(), count, deadline)
                                               : RecvVec(fd, iov_.data(), count, deadline);
  }

 private:
  std::array<iovec, kChunkIovecs> iov_;  // not cleared: only the first count_ entries mean anything
  size_t count_ = 0;
  uint64_t bytes_ = 0;
};

// Moves all but the last chunk, which it leaves in `chunk`.
Status MoveFullChunks(int fd, StreamDirection direction, const CachePin &pin, uint32_t first_tensor,
                      uint32_t tensor_count, const std::vector<Span> &spans, Deadline deadline, Chunk &chunk) {
  for (uint32_t tensor = 0; tensor < tensor_count; ++tensor) {
    for (const Span &span : spans) {
      const auto resolved = pin.Resolve(uint64_t{first_tensor} + tensor, span.offset, span.length);
      if (!resolved.ok()) {
        return resolved.status();
      }
      for (uint64_t done = 0; done < span.length;) {
        if (chunk.Full()) {
          if (Status status = chunk.Move(fd, direction, deadline); !status.ok()) {
            return status;
          }
        }
        const uint64_t length = std::min(span.length - done, chunk.RoomBytes());
        chunk.Add(resolved.value() + done, length);
        done += length;
      }
    }
  }
  return Status::Ok();
}

}  // namespace

Status StreamSpans(int fd, StreamDirection direction, const CachePin &pin, uint32_t first_tensor,
                   uint32_t tensor_count, const std::vector<Span> &spans, Deadline deadline) {
  Chunk chunk;
  Status status = MoveFullChunks(fd, direction, pin, first_tensor, tensor_count, spans, deadline, chunk);
  return status.ok() ? chunk.Move(fd, direction, deadline) : status;
}

Status SendSpans(int fd, CachePin pin, uint32_t first_tensor, uint32_t tensor_count, const std::vector<Span> &spans,
                 Deadline deadline) {
  constexpr StreamDirection kSend = StreamDirection::kSend;
  Chunk chunk;
  if (Status status = MoveFullChunks(fd, kSend, pin, first_tensor, tensor_count, spans, deadline, chunk);
      !status.ok()) {
    return status;
  }
  const std::vector<std::byte> tail = chunk.TakeTail();
  if (Status status = chunk.Move(fd, kSend, deadline); !status.ok()) {
    return status;
  }
  pin = CachePin();
  return SendAll(fd, tail.data(), tail.size(), deadline);
}

void TuneStream(int fd) {
  const int on = 1;
  (void)::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  (void)::setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &kUserTimeoutMs, sizeof(kUserTimeoutMs));
}

}  // namespace datadist
