#include "base/bytes.h"

#include <algorithm>
#include <limits>

namespace datadist {

void Writer::Append(uint64_t value, size_t size) {
  for (size_t i = 0; i < size; ++i) {
    bytes_.push_back(static_cast<uint8_t>(value >> (8 * i)));
  }
}

void Writer::Bytes(const void *data, size_t size) {
  const auto *first = static_cast<const uint8_t *>(data);
  bytes_.insert(bytes_.end(), first, first + size);
}

void Writer::Text(std::string_view text, size_t max_size) {
  const size_t size = std::min({text.size(), max_size, size_t{std::numeric_limits<uint16_t>::max()}});
  U16(static_cast<uint16_t>(size));
  Bytes(text.data(), size);
}

void Writer::PatchU32(size_t offset, uint32_t value) {
  for (size_t i = 0; i < sizeof(value); ++i) {
    bytes_.at(offset + i) = static_cast<uint8_t>(value >> (8 * i));
  }
}

bool Reader::Claim(size_t size) {
  if (!ok_ || size > left_) {
    ok_ = false;
    left_ = 0;
    return false;
  }
  left_ -= size;
  return true;
}

uint64_t Reader::Take(size_t size) {
  if (!Claim(size)) {
    return 0;
  }
  uint64_t value = 0;
  for (size_t i = 0; i < size; ++i) {
    value |= static_cast<uint64_t>(next_[i]) << (8 * i);
  }
  next_ += size;
  return value;
}

// Of no bytes `out` may be null, which memcpy must not be given.
void Reader::Bytes(void *out, size_t size) {
  auto *const bytes = static_cast<uint8_t *>(out);
  if (!Claim(size)) {
    std::fill_n(bytes, size, uint8_t{0});
    return;
  }
  std::copy_n(next_, size, bytes);
  next_ += size;
}

std::string Reader::Text(size_t max_size) {
  const size_t size = U16();
  if (size > max_size) {
    ok_ = false;
    left_ = 0;
    return {};
  }
  if (!Claim(size)) {
    return {};
  }
  std::string text(reinterpret_cast<const char *>(next_), size);
  next_ += size;
  return text;
}

}  // namespace datadist
