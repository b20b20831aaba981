// Arithmetic on sizes that came from outside: no value instead of a wrapped one.
#ifndef DATADIST_BASE_CHECKED_H_
#define DATADIST_BASE_CHECKED_H_

#include <cstdint>
#include <optional>

namespace datadist {

inline std::optional<uint64_t> CheckedAdd(uint64_t a, uint64_t b) {
  uint64_t sum = 0;
  if (__builtin_add_overflow(a, b, &sum)) {
    return std::nullopt;
  }
  return sum;
}

inline std::optional<uint64_t> CheckedMul(uint64_t a, uint64_t b) {
  uint64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) {
    return std::nullopt;
  }
  return product;
}

// Whether [offset, offset + length) lies in [0, size).
constexpr bool RangeFits(uint64_t offset, uint64_t length, uint64_t size) {
  return offset <= size && length <= size - offset;
}

}  // namespace datadist

#endif  // DATADIST_BASE_CHECKED_H_
