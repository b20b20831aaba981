// HMAC-SHA256 by the system's OpenSSL, which is loaded when the first key is: who uses no key needs none.
#ifndef DATADIST_BASE_HMAC_H_
#define DATADIST_BASE_HMAC_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace datadist {

using Digest = std::array<uint8_t, 32>;

// LLM_FAILED where there is no libcrypto, saying which were looked for.
Status LoadHmac();

// HmacSha256 and HmacOf may be called after LoadHmac was ok, from any thread. Throws std::bad_alloc where OpenSSL has no
// memory.
Digest HmacSha256(const Digest &key, const void *data, size_t size);

// Of a label and what follows it. Labels are literals of ours, none of which begins another.
Digest HmacOf(const Digest &key, std::string_view label, const std::vector<uint8_t> &data = {});

// In a time that says nothing of where they differ.
bool SameBytes(const uint8_t *a, const uint8_t *b, size_t size);

template <size_t N>
bool SameBytes(const std::array<uint8_t, N> &a, const std::array<uint8_t, N> &b) {
  return SameBytes(a.data(), b.data(), N);
}

}  // namespace datadist

#endif  // DATADIST_BASE_HMAC_H_
