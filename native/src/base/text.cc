#include "base/text.h"

#include <algorithm>
#include <cstdint>

namespace datadist {
namespace {

struct Character {
  size_t size = 0;  // 0: no UTF-8
  uint32_t code = 0;
};

// The character at the start of a text that is not empty; overlong forms, surrogates and what is beyond Unicode are no
// UTF-8.
Character FirstCharacter(std::string_view text) {
  const auto lead = static_cast<uint8_t>(text[0]);
  if (lead < 0x80) {
    return {1, lead};
  }
  const size_t size = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
  if (lead < 0xC2 || lead > 0xF4 || text.size() < size) {
    return {};
  }
  uint32_t code = lead & (0x7FU >> size);
  for (size_t i = 1; i < size; ++i) {
    const auto next = static_cast<uint8_t>(text[i]);
    if ((next & 0xC0U) != 0x80U) {
      return {};
    }
    code = code << 6 | (next & 0x3FU);
  }
  constexpr uint32_t kLowest[] = {0, 0, 0x80, 0x800, 0x10000};
  const bool surrogate = code >= 0xD800 && code <= 0xDFFF;
  return code < kLowest[size] || surrogate || code > 0x10FFFF ? Character{} : Character{size, code};
}

// Also the separators of lines and paragraphs, and what reverses the direction of the text that follows.
bool IsControl(uint32_t code) {
  return code < 0x20 || (code >= 0x7F && code < 0xA0) || code == 0x2028 || code == 0x2029 ||
         (code >= 0x202A && code <= 0x202E) || (code >= 0x2066 && code <= 0x2069);
}

}  // namespace

std::string OneLine(std::string_view text) {
  constexpr std::string_view kCut = "...";
  const bool plain = text.size() <= kMaxShownText &&
                     std::all_of(text.begin(), text.end(), [](char c) { return c >= 0x20 && c < 0x7F; });
  if (plain) {
    return std::string(text);
  }
  std::string line;
  while (!text.empty()) {
    const Character next = FirstCharacter(text);
    const size_t size = std::max<size_t>(next.size, 1);
    const bool rest_fits = line.size() + text.size() <= kMaxShownText;
    if (!rest_fits && line.size() + size > kMaxShownText - kCut.size()) {
      return line.append(kCut);
    }
    if (next.size == 0) {
      line.push_back('?');
    } else if (IsControl(next.code)) {
      line.push_back(' ');
    } else {
      line.append(text.substr(0, size));
    }
    text.remove_prefix(size);
  }
  return line;
}

}  // namespace datadist
