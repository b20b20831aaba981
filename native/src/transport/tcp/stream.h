// Bytes of caches straight into and out of a data connection: no staging copy, but for the end of a pull.
#ifndef DATADIST_TRANSPORT_TCP_STREAM_H_
#define DATADIST_TRANSPORT_TCP_STREAM_H_

#include <vector>

#include "base/deadline.h"
#include "base/status.h"
#include "memory/region_table.h"
#include "transport/tcp/wire.h"

namespace datadist {

enum class StreamDirection { kSend, kRecv };

// The spans of each of the tensors [first_tensor, +tensor_count) of the pinned cache, tensor after tensor. Every piece
// is resolved through the pin; a span outside the cache ends the call with LLM_PARAM_INVALID before it is touched.
Status StreamSpans(int fd, StreamDirection direction, const CachePin &pin, uint32_t first_tensor,
                   uint32_t tensor_count, const std::vector<Span> &spans, Deadline deadline);

// As StreamSpans to kSend, and lets go of the cache before the peer has the last byte: who has been told that a pull is
// complete may free the cache, and finds its memory free.
Status SendSpans(int fd, CachePin pin, uint32_t first_tensor, uint32_t tensor_count, const std::vector<Span> &spans,
                 Deadline deadline);

// No delay for small requests, a bound on unacknowledged bytes. Best effort: a stream without them is slower, not wrong.
// Congestion control is the administrator's choice.
void TuneStream(int fd);

}  // namespace datadist

#endif  // DATADIST_TRANSPORT_TCP_STREAM_H_
