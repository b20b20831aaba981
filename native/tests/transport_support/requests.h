// Requests of the tcp wire for tests: a good one, and every way to spoil one of its fields.
#ifndef DATADIST_TESTS_TRANSPORT_SUPPORT_REQUESTS_H_
#define DATADIST_TESTS_TRANSPORT_SUPPORT_REQUESTS_H_

#include <algorithm>
#include <vector>

#include "transport/tcp/wire.h"
#include "transport/transport.h"

namespace datadist::test {

// Asks for one span of 64 bytes of two tensors.
inline RequestHeader GoodHeader(const RemoteCache &remote) {
  RequestHeader header;
  header.op = DataOp::kPull;
  header.remaining_ms = 20'000;
  header.cache_id = remote.cache_id;
  header.generation = remote.generation;
  header.first_tensor = 0;
  header.tensor_count = 2;
  header.span_count = 1;
  header.total_bytes = 2 * 64;
  return header;
}

inline std::vector<uint8_t> Encoded(const RequestHeader &header, const std::vector<Span> &spans) {
  Writer out;
  EncodeRequest(header, spans, out);
  return out.Take();
}

// Bytes of an encoded request of one span to overwrite, and the field that the error must name.
struct BadField {
  const char *field;
  size_t offset;
  std::vector<uint8_t> bytes;
};

inline const std::vector<BadField> kBadFields = {
    {"magic", 0, {'X'}},         {"magic", 3, {'S'}},
    {"version", 4, {0}},         {"version", 4, {2}},
    {"version", 5, {1}},         {"op", 6, {0}},
    {"op", 6, {3}},              {"op", 6, {255}},
    {"reserved", 7, {1}},        {"remaining_ms", 8, {0, 0, 0, 0}},
    {"tensor_count", 32, {0, 0, 0, 0}},
    {"span_count", 36, {0, 0, 0, 0}},
    {"span_count", 36, {1, 128, 0, 0}},
    {"span_count", 36, {255, 255, 255, 255}},
    {"total_bytes", 40, {0, 0, 0, 0, 0, 0, 0, 0}},
    {"total_bytes", 40, {129}},
    {"total_bytes", 47, {255}},
    {"total_bytes", 32, {255, 255, 255, 255}},  // a tensor count that its total does not match
    {"span length", 56, {0}},
    {"total_bytes", 63, {255}},
};

inline std::vector<uint8_t> Spoiled(std::vector<uint8_t> frame, const BadField &bad) {
  std::copy(bad.bytes.begin(), bad.bytes.end(), frame.begin() + static_cast<long>(bad.offset));
  return frame;
}

}  // namespace datadist::test

#endif  // DATADIST_TESTS_TRANSPORT_SUPPORT_REQUESTS_H_
