// The data connections of tcp: input = request or response, bytes.
#include "fuzz/fuzz.h"
#include "transport/tcp/wire.h"

namespace datadist::fuzz {
namespace {

enum Kind : uint8_t { kRequest, kResponse };

void Request(Input &input) {
  const Bytes head = input.Take(kRequestHeaderBytes);
  if (head.size() < kRequestHeaderBytes) {
    return;
  }
  const Result<RequestHeader> header = DecodeRequestHeader(head.data());
  if (!header.ok()) {
    return;
  }
  FUZZ_CHECK(header.value().span_count <= kMaxSpansPerRequest);
  const Bytes listed = input.Take(header.value().span_count * kSpanBytes);
  if (listed.size() < header.value().span_count * kSpanBytes) {
    return;
  }
  const Result<std::vector<Span>> spans = DecodeSpans(listed.data(), header.value());
  if (!spans.ok()) {
    return;
  }
  Writer again;
  EncodeRequest(header.value(), spans.value(), again);
  Bytes all = head;
  all.insert(all.end(), listed.begin(), listed.end());
  FUZZ_CHECK(again.Take() == all);
  // Where a span is too long for the total, the bytes that follow would be taken for the next request.
  for (const Span &span : spans.value()) {
    FUZZ_CHECK(span.length > 0 && span.length <= header.value().total_bytes / header.value().tensor_count);
  }
}

void Response(Input &input) {
  const Bytes head = input.Take(kResponseHeaderBytes);
  if (head.size() < kResponseHeaderBytes) {
    return;
  }
  const Result<ResponseHeader> header = DecodeResponseHeader(head.data());
  FUZZ_CHECK(!header.ok() || header.value().text_bytes <= kMaxTextBytes);
}

}  // namespace
}  // namespace datadist::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  using namespace datadist::fuzz;  // NOLINT(google-build-using-namespace): this file's own
  Input input(data, size);
  switch (input.U8()) {
    case kRequest:
      Request(input);
      break;
    case kResponse:
      Response(input);
      break;
    default:
      break;
  }
  return 0;
}
