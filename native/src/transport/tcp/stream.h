// Bytes of caches straight into and out of a data connection: no staging copy, but for the end of a pull.
#ifndef DATADIST_TRANSPORT_TCP_STREAM_H_
#define DATADIST_TRANSPORT_TCP_STREAM_H_

#include <sys/uio.h>

#include <cstdint>
#include <vector>

#include "base/deadline.h"
#include "base/iovecs.h"
#include "base/status.h"
#include "memory/region_table.h"
#include "transport/tcp/wire.h"

namespace datadist {

// The iovecs of one system call. Lives on the stack: only the first `count` entries mean anything.
struct Chunk {
  // Larger ones fill the socket buffer beyond what the peer drains meanwhile, smaller ones pay for more calls. 256 KiB
  // to 1 MiB measure alike.
  static constexpr uint64_t kMostBytes = 512 << 10;

  iovec iov[kMaxIovecs];
  size_t count = 0;
  uint64_t bytes = 0;

  bool Full() const { return count == kMaxIovecs || bytes >= kMostBytes; }
  void Add(const void *base, uint64_t length) {
    AppendIovec(iov, count, reinterpret_cast<uintptr_t>(base), length);
    bytes += length;
  }
};

// Where a transfer is in the spans of each of the tensors [first_tensor, +tensor_count), tensor after tensor.
class SpanCursor {
 public:
  SpanCursor(uint32_t first_tensor, uint32_t tensor_count, const std::vector<Span> &spans);

  bool AtEnd() const { return left_ == 0; }
  uint64_t left() const { return left_; }
  // Adds what comes next, at most `most` bytes and no more than the chunk takes. Every piece is resolved through the
  // pin: LLM_PARAM_INVALID for one outside the cache.
  Status Gather(const std::vector<Span> &spans, const CachePin &pin, uint64_t most, Chunk &chunk) const;
  void Advance(const std::vector<Span> &spans, uint64_t bytes);

 private:
  uint64_t tensor_;
  size_t span_ = 0;
  uint64_t offset_ = 0;  // inside the span
  uint64_t left_ = 0;
};

enum class StreamDirection { kSend, kRecv };

// All of the spans; blocks until then.
Status StreamSpans(int fd, StreamDirection direction, const CachePin &pin, uint32_t first_tensor,
                   uint32_t tensor_count, const std::vector<Span> &spans, Deadline deadline);

// No delay for small requests, a bound on unacknowledged bytes. Best effort: a stream without them is slower, not wrong.
// Congestion control is the administrator's choice.
void TuneStream(int fd);

}  // namespace datadist

#endif  // DATADIST_TRANSPORT_TCP_STREAM_H_
