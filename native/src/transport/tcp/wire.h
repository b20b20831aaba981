// The request/response protocol of one data connection, little-endian. No addresses: a request names bytes of a cache,
// the owner of the memory looks up where they are.
//
//   pull   initiator: request, runs                       owner: response, and if it says LLM_SUCCESS the bytes
//   push   initiator: request, runs      owner: response ("go")      initiator: bytes      owner: response ("done")
//
// A response other than LLM_SUCCESS carries no bytes and leaves the connection ready for the next request. Whatever
// does not decode ends the connection.
#ifndef DATADIST_TRANSPORT_TCP_WIRE_H_
#define DATADIST_TRANSPORT_TCP_WIRE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/status.h"
#include "memory/remote_cache.h"

namespace datadist {

enum class DataOp : uint8_t { kPull = 1, kPush = 2 };

// Bounds what one request makes its owner allocate: 512 KiB. Larger transfers take several requests.
constexpr uint32_t kMaxSpansPerRequest = 32768;
constexpr size_t kMaxTextBytes = 512;

struct RequestHeader {
  DataOp op = DataOp::kPull;
  uint32_t remaining_ms = 0;  // of the initiator's deadline; not 0
  int64_t cache_id = 0;
  uint64_t generation = 0;
  uint32_t first_tensor = 0;
  uint32_t tensor_count = 0;  // not 0
  uint32_t span_count = 0;    // 1..kMaxSpansPerRequest
  uint64_t total_bytes = 0;   // of all spans and tensors together
};

constexpr size_t kRequestHeaderBytes = 48;
constexpr size_t kSpanBytes = 16;

void EncodeRequest(const RequestHeader &header, const std::vector<Span> &spans, Writer &out);
// From exactly kRequestHeaderBytes; LLM_FAILED naming the field that is wrong.
Result<RequestHeader> DecodeRequestHeader(const void *data);
// From exactly span_count * kSpanBytes; the spans' sum must be what the header says.
Result<std::vector<Span>> DecodeSpans(const void *data, const RequestHeader &header);

// `text` follows the header on the wire.
struct ResponseHeader {
  llm_datadist::Status status = llm_datadist::LLM_SUCCESS;
  uint16_t text_bytes = 0;    // 0..kMaxTextBytes
  uint64_t total_bytes = 0;   // as in the request
};

constexpr size_t kResponseHeaderBytes = 20;

void EncodeResponse(const Status &status, uint64_t total_bytes, Writer &out);
// From exactly kResponseHeaderBytes.
Result<ResponseHeader> DecodeResponseHeader(const void *data);

}  // namespace datadist

#endif  // DATADIST_TRANSPORT_TCP_WIRE_H_
