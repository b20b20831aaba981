#include "base/crc32c.h"

#include <array>

namespace datadist {
namespace {

constexpr uint32_t kReflectedPolynomial = 0x82F63B78U;

constexpr size_t kStride = 8;
using Tables = std::array<std::array<uint32_t, 256>, kStride>;

// tables[k][byte]: the checksum of that byte with k zero bytes behind it.
constexpr Tables MakeTables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) {
      crc = (crc & 1U) != 0 ? (crc >> 1U) ^ kReflectedPolynomial : crc >> 1U;
    }
    tables[0][byte] = crc;
  }
  for (size_t k = 1; k < kStride; ++k) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[k - 1][byte];
      tables[k][byte] = (before >> 8U) ^ tables[0][before & 0xFFU];
    }
  }
  return tables;
}

constexpr Tables kTables = MakeTables();

}  // namespace

// Eight bytes at a time: the loop thread checks what peers send, and all links wait for it.
uint32_t Crc32c(const void *data, size_t size, uint32_t before) {
  const auto *bytes = static_cast<const uint8_t *>(data);
  uint32_t crc = ~before;
  for (; size >= kStride; size -= kStride, bytes += kStride) {
    const uint32_t low = crc ^ (uint32_t{bytes[0]} | uint32_t{bytes[1]} << 8U | uint32_t{bytes[2]} << 16U |
                                uint32_t{bytes[3]} << 24U);
    crc = kTables[7][low & 0xFFU] ^ kTables[6][(low >> 8U) & 0xFFU] ^ kTables[5][(low >> 16U) & 0xFFU] ^
          kTables[4][low >> 24U] ^ kTables[3][bytes[4]] ^ kTables[2][bytes[5]] ^ kTables[1][bytes[6]] ^
          kTables[0][bytes[7]];
  }
  for (size_t i = 0; i < size; ++i) {
    crc = (crc >> 8U) ^ kTables[0][(crc ^ bytes[i]) & 0xFFU];
  }
  return ~crc;
}

}  // namespace datadist
