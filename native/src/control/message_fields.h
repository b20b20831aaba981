// Fields that several messages have, as they are written and read. For the messages_*.cc only.
#ifndef DATADIST_CONTROL_MESSAGE_FIELDS_H_
#define DATADIST_CONTROL_MESSAGE_FIELDS_H_

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <string>

#include "base/bytes.h"
#include "base/status.h"

namespace datadist {

constexpr size_t kMaxText = 1024;

inline Status Malformed(const char *message) {
  return Status(llm_datadist::LLM_FAILED, std::string("malformed ") + message);
}

template <size_t N>
void Put(Writer &writer, const std::array<uint8_t, N> &bytes) {
  writer.Bytes(bytes.data(), bytes.size());
}

template <size_t N>
void Get(Reader &reader, std::array<uint8_t, N> &bytes) {
  reader.Bytes(bytes.data(), bytes.size());
}

inline void Put(Writer &writer, const Status &status) {
  writer.U32(status.code());
  writer.Text(status.text(), kMaxText);
}

// A status of the peer's; `allowed` are the failures that the message may carry. The peer does not choose what our
// caller is told: of any other code the reader fails.
inline std::optional<Status> GetStatus(Reader &reader, std::initializer_list<llm_datadist::Status> allowed) {
  const uint32_t code = reader.U32();
  const std::string text = reader.Text(kMaxText);
  if (!reader.ok() || (code != llm_datadist::LLM_SUCCESS &&
                       std::find(allowed.begin(), allowed.end(), code) == allowed.end())) {
    return std::nullopt;
  }
  return code == llm_datadist::LLM_SUCCESS ? Status::Ok() : Status(code, text);
}

}  // namespace datadist

#endif  // DATADIST_CONTROL_MESSAGE_FIELDS_H_
