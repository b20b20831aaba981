// Texts that others chose: input = how it is read, text.
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <string>
#include <string_view>

#include "base/fd.h"
#include "base/text.h"
#include "control/address.h"
#include "control/key_ring.h"
#include "fuzz/fuzz.h"

namespace datadist::fuzz {
namespace {

enum Kind : uint8_t { kShown, kAddress, kKeyFile };

// Ends of lines and of paragraphs, and what turns the direction of a text: U+2028..202E, U+2066..2069.
bool IsSeparator(std::string_view three_bytes) {
  return (three_bytes >= "\xE2\x80\xA8" && three_bytes <= "\xE2\x80\xAE") ||
         (three_bytes >= "\xE2\x81\xA6" && three_bytes <= "\xE2\x81\xA9");
}

// Whether a text is UTF-8 with no control character in it; written apart from OneLine, as the Unicode tables have it.
bool IsPlainUtf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const auto at = [&](size_t next) -> uint32_t {
      return i + next < text.size() ? static_cast<uint8_t>(text[i + next]) : 0U;
    };
    const auto follows = [&](size_t next, uint32_t lowest, uint32_t highest) {
      return at(next) >= lowest && at(next) <= highest;
    };
    const uint32_t lead = at(0);
    size_t size = 0;
    if (lead >= 0x20 && lead < 0x7F) {
      size = 1;
    } else if (lead >= 0xC2 && lead <= 0xDF && follows(1, lead == 0xC2 ? 0xA0 : 0x80, 0xBF)) {
      size = 2;
    } else if (lead >= 0xE0 && lead <= 0xEF &&
               follows(1, lead == 0xE0 ? 0xA0 : 0x80, lead == 0xED ? 0x9F : 0xBF) && follows(2, 0x80, 0xBF) &&
               !IsSeparator(text.substr(i, 3))) {
      size = 3;
    } else if (lead >= 0xF0 && lead <= 0xF4 &&
               follows(1, lead == 0xF0 ? 0x90 : 0x80, lead == 0xF4 ? 0x8F : 0xBF) && follows(2, 0x80, 0xBF) &&
               follows(3, 0x80, 0xBF)) {
      size = 4;
    } else {
      return false;
    }
    i += size;
  }
  return true;
}

void Shown(const std::string &text) {
  const std::string line = OneLine(text);
  FUZZ_CHECK(line.size() <= kMaxShownText);
  FUZZ_CHECK(IsPlainUtf8(line));
  FUZZ_CHECK(OneLine(line) == line);
  FUZZ_CHECK(!IsPlainUtf8(text) || text.size() > kMaxShownText || line.size() == text.size());
}

void Address(const std::string &text) {
  const Result<SocketAddress> address = SocketAddress::Parse(text);
  if (address.ok()) {
    FUZZ_CHECK(text.find('\0') == std::string::npos);
    const std::string shown = address.value().ToString();
    const Result<SocketAddress> again = SocketAddress::Parse(shown);
    FUZZ_CHECK(again.ok() && again.value().ToString() == shown);
    FUZZ_CHECK(again.value().port() == address.value().port());
  }
}

void KeyFile(const std::string &text) {
  const Fd file(::memfd_create("key", MFD_CLOEXEC));
  FUZZ_CHECK(file && ::fchmod(file.get(), 0600) == 0);
  FUZZ_CHECK(::write(file.get(), text.data(), text.size()) == static_cast<ssize_t>(text.size()));
  const Result<std::shared_ptr<KeyRing>> ring = KeyRing::FromFile("/proc/self/fd/" + std::to_string(file.get()));
  if (ring.ok()) {
    const size_t keys = ring.value()->Keys().size();
    FUZZ_CHECK(keys >= 1 && keys <= kMaxKeys);
  }
}

}  // namespace
}  // namespace datadist::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  using namespace datadist::fuzz;  // NOLINT(google-build-using-namespace): this file's own
  Input input(data, size);
  switch (input.U8()) {
    case kShown:
      Shown(input.RestAsText());
      break;
    case kAddress:
      Address(input.RestAsText());
      break;
    case kKeyFile:
      KeyFile(input.RestAsText());
      break;
    default:
      break;
  }
  return 0;
}
