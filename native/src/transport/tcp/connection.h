// The owner's end of a data connection, as a machine that never blocks:
//
//   header ──> list of spans ──> answer (refusal, "go", or the pull's first bytes) ──> bytes in or out ──> header ...
//
// Each request names (cache, generation, tensors, spans); it is resolved and checked against the region table before a
// byte moves, under a pin. Whatever does not decode ends the connection. Memory is taken as bytes come: what a peer
// announces costs it as much as us.
#ifndef DATADIST_TRANSPORT_TCP_CONNECTION_H_
#define DATADIST_TRANSPORT_TCP_CONNECTION_H_

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "base/deadline.h"
#include "memory/region_table.h"
#include "transport/tcp/stream.h"
#include "transport/tcp/wire.h"

namespace datadist {

class TcpConnection {
 public:
  // `fd` outlives it. A request holds its pin no longer than the smaller of the time that the peer gave and
  // `max_request`.
  TcpConnection(int fd, std::shared_ptr<RegionTable> regions, uint64_t peer, std::chrono::milliseconds max_request);

  enum class Next : uint8_t { kRead, kWrite, kEnd };
  // One turn: does what the socket takes and gives, a bounded amount of it, so that others get theirs. What to wait for
  // then may be there at once.
  Next Serve();

  // Of the request that is being served.
  const std::optional<Deadline> &deadline() const { return deadline_; }

 private:
  enum class Phase : uint8_t { kHeader, kSpans, kAnswer, kBytesIn };

  // None: it may go on.
  std::optional<Next> Step();
  std::optional<Next> ReadHeader();
  std::optional<Next> ReadSpans();
  std::optional<Next> WriteAnswer();
  std::optional<Next> WriteBytes();
  std::optional<Next> ReadBytes();

  // How a system call went: none, and the bytes in `moved`, or what to wait for.
  std::optional<Next> Receive(void *data, size_t size, size_t &moved);
  std::optional<Next> Move(Chunk &chunk, Next direction, size_t &moved);

  void Answer();
  bool TakeTail();
  void EndRequest();

  const int fd_;
  const std::shared_ptr<RegionTable> regions_;
  const uint64_t peer_;  // its cluster id
  const std::chrono::milliseconds max_request_;

  Phase phase_ = Phase::kHeader;
  std::array<uint8_t, kRequestHeaderBytes> head_{};
  std::vector<uint8_t> list_;  // the spans as they come
  size_t filled_ = 0;          // of head_ or list_
  std::optional<Deadline> deadline_;
  RequestHeader header_;
  std::vector<Span> spans_;
  CachePin pin_;  // while bytes of the cache move
  std::optional<SpanCursor> cursor_;
  std::vector<uint8_t> answer_;
  size_t answered_ = 0;
  size_t calls_left_ = 0;  // of this turn
  uint64_t bytes_left_ = 0;
};

}  // namespace datadist

#endif  // DATADIST_TRANSPORT_TCP_CONNECTION_H_
