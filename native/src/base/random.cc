#include "base/random.h"

#include <sys/random.h>

#include <cerrno>

#include "base/socket_io.h"

namespace datadist {

Result<std::array<uint8_t, 16>> RandomBytes() {
  std::array<uint8_t, 16> bytes{};
  // Up to 256 bytes come whole or not at all.
  if (::getrandom(bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
    return Status(llm_datadist::LLM_FAILED, "getrandom: " + ErrnoText(errno));
  }
  return bytes;
}

}  // namespace datadist
