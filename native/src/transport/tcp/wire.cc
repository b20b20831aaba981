#include "transport/tcp/wire.h"

#include <optional>

#include "base/checked.h"

namespace datadist {
namespace {

constexpr uint32_t kRequestMagic = 0x51524444;   // "DDRQ"
constexpr uint32_t kResponseMagic = 0x53524444;  // "DDRS"
constexpr uint16_t kVersion = 1;

Status Malformed(const char *field, uint64_t value, const char *allowed) {
  return Status(llm_datadist::LLM_FAILED, std::string("malformed frame: ") + field + " " + std::to_string(value) +
                                              ", expected " + allowed);
}

// Sum of the spans over all tensors; none on overflow.
std::optional<uint64_t> SumOf(const std::vector<Span> &spans, uint32_t tensor_count) {
  uint64_t per_tensor = 0;
  for (const Span &span : spans) {
    const auto sum = CheckedAdd(per_tensor, span.length);
    if (!sum) {
      return std::nullopt;
    }
    per_tensor = *sum;
  }
  return CheckedMul(per_tensor, tensor_count);
}

}  // namespace

void EncodeRequest(const RequestHeader &header, const std::vector<Span> &spans, Writer &out) {
  out.Reserve(kRequestHeaderBytes + spans.size() * kSpanBytes);
  out.U32(kRequestMagic);
  out.U16(kVersion);
  out.U8(static_cast<uint8_t>(header.op));
  out.U8(0);
  out.U32(header.remaining_ms);
  out.I64(header.cache_id);
  out.U64(header.generation);
  out.U32(header.first_tensor);
  out.U32(header.tensor_count);
  out.U32(header.span_count);
  out.U64(header.total_bytes);
  for (const Span &span : spans) {
    out.U64(span.offset);
    out.U64(span.length);
  }
}

Result<RequestHeader> DecodeRequestHeader(const void *data) {
  Reader in(data, kRequestHeaderBytes);
  if (const uint32_t magic = in.U32(); magic != kRequestMagic) {
    return Malformed("magic", magic, "that of a data request");
  }
  if (const uint16_t version = in.U16(); version != kVersion) {
    return Malformed("version", version, "1");
  }
  const uint8_t op = in.U8();
  if (op != static_cast<uint8_t>(DataOp::kPull) && op != static_cast<uint8_t>(DataOp::kPush)) {
    return Malformed("op", op, "1 or 2");
  }
  if (const uint8_t reserved = in.U8(); reserved != 0) {
    return Malformed("reserved", reserved, "0");
  }
  RequestHeader header;
  header.op = static_cast<DataOp>(op);
  header.remaining_ms = in.U32();
  header.cache_id = in.I64();
  header.generation = in.U64();
  header.first_tensor = in.U32();
  header.tensor_count = in.U32();
  header.span_count = in.U32();
  header.total_bytes = in.U64();
  if (header.remaining_ms == 0) {
    return Malformed("remaining_ms", 0, "more");
  }
  if (header.tensor_count == 0) {
    return Malformed("tensor_count", 0, "more");
  }
  if (header.span_count == 0 || header.span_count > kMaxSpansPerRequest) {
    return Malformed("span_count", header.span_count, "1..32768");
  }
  if (header.total_bytes == 0) {
    return Malformed("total_bytes", 0, "more");
  }
  return header;
}

Result<std::vector<Span>> DecodeSpans(const void *data, const RequestHeader &header) {
  Reader in(data, header.span_count * kSpanBytes);
  std::vector<Span> spans(header.span_count);
  for (Span &span : spans) {
    span.offset = in.U64();
    span.length = in.U64();
    if (span.length == 0) {
      return Malformed("span length", 0, "more");
    }
  }
  const auto sum = SumOf(spans, header.tensor_count);
  if (!sum || *sum != header.total_bytes) {
    return Malformed("total_bytes", header.total_bytes, "the sum of the spans over all tensors");
  }
  return spans;
}

void EncodeResponse(const Status &status, uint64_t total_bytes, Writer &out) {
  out.U32(kResponseMagic);
  out.U32(status.code());
  out.U64(total_bytes);
  out.U16(0);
  out.Text(status.text(), kMaxTextBytes);
}

Result<ResponseHeader> DecodeResponseHeader(const void *data) {
  Reader in(data, kResponseHeaderBytes);
  if (const uint32_t magic = in.U32(); magic != kResponseMagic) {
    return Malformed("magic", magic, "that of a data response");
  }
  ResponseHeader header;
  header.status = in.U32();
  header.total_bytes = in.U64();
  if (const uint16_t reserved = in.U16(); reserved != 0) {
    return Malformed("reserved", reserved, "0");
  }
  header.text_bytes = in.U16();
  if (header.status != llm_datadist::LLM_SUCCESS && header.status != llm_datadist::LLM_PARAM_INVALID &&
      header.status != llm_datadist::LLM_KV_CACHE_NOT_EXIST) {
    return Malformed("status", header.status, "success, LLM_PARAM_INVALID or LLM_KV_CACHE_NOT_EXIST");
  }
  if (header.text_bytes > kMaxTextBytes) {
    return Malformed("text length", header.text_bytes, "0..512");
  }
  return header;
}

}  // namespace datadist
