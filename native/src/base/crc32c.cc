#include "base/crc32c.h"

#include <array>

namespace datadist {
namespace {

constexpr uint32_t kReflectedPolynomial = 0x82F63B78U;

constexpr std::array<uint32_t, 256> MakeTable() {
  std::array<uint32_t, 256> table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) {
      crc = (crc & 1U) != 0 ? (crc >> 1U) ^ kReflectedPolynomial : crc >> 1U;
    }
    table[byte] = crc;
  }
  return table;
}

constexpr std::array<uint32_t, 256> kTable = MakeTable();

}  // namespace

uint32_t Crc32c(const void *data, size_t size, uint32_t before) {
  const auto *bytes = static_cast<const uint8_t *>(data);
  uint32_t crc = ~before;
  for (size_t i = 0; i < size; ++i) {
    crc = (crc >> 8U) ^ kTable[(crc ^ bytes[i]) & 0xFFU];
  }
  return ~crc;
}

}  // namespace datadist
