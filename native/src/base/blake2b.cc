#include "base/blake2b.h"

#include <endian.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace datadist {
namespace {

constexpr std::array<uint64_t, 8> kInitial = {
    0x6a09e667f3bcc908U, 0xbb67ae8584caa73bU, 0x3c6ef372fe94f82bU, 0xa54ff53a5f1d36f1U,
    0x510e527fade682d1U, 0x9b05688c2b3e6c1fU, 0x1f83d9abfb41bd6bU, 0x5be0cd19137e2179U,
};

constexpr uint8_t kSigma[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0},
};
constexpr size_t kRounds = 12;

uint64_t LoadWord(const uint8_t *bytes) {
  uint64_t word = 0;
  std::memcpy(&word, bytes, sizeof(word));
  return le64toh(word);
}

uint64_t Rotate(uint64_t word, unsigned bits) { return word >> bits | word << (64 - bits); }

inline void Mix(uint64_t &a, uint64_t &b, uint64_t &c, uint64_t &d, uint64_t x, uint64_t y) {
  a += b + x;
  d = Rotate(d ^ a, 32);
  c += d;
  b = Rotate(b ^ c, 24);
  a += b + y;
  d = Rotate(d ^ a, 16);
  c += d;
  b = Rotate(b ^ c, 63);
}

using Words = std::array<uint64_t, 16>;

template <size_t kRound>
inline void MixRound(Words &v, const Words &m) {
  constexpr const auto &s = kSigma[kRound % 10];
  Mix(v[0], v[4], v[8], v[12], m[s[0]], m[s[1]]);
  Mix(v[1], v[5], v[9], v[13], m[s[2]], m[s[3]]);
  Mix(v[2], v[6], v[10], v[14], m[s[4]], m[s[5]]);
  Mix(v[3], v[7], v[11], v[15], m[s[6]], m[s[7]]);
  Mix(v[0], v[5], v[10], v[15], m[s[8]], m[s[9]]);
  Mix(v[1], v[6], v[11], v[12], m[s[10]], m[s[11]]);
  Mix(v[2], v[7], v[8], v[13], m[s[12]], m[s[13]]);
  Mix(v[3], v[4], v[9], v[14], m[s[14]], m[s[15]]);
}

// A template, because a compiler that leaves this a loop takes half as long again.
template <size_t... kRound>
inline void MixRounds(Words &v, const Words &m, std::index_sequence<kRound...>) {
  (MixRound<kRound>(v, m), ...);
}

}  // namespace

Blake2b::Blake2b() : state_(kInitial) { state_[0] ^= 0x01010000U ^ sizeof(Digest); }

void Blake2b::Compress(const uint8_t *block, size_t num_new, bool is_last) {
  size_ += num_new;
  Words m{};
  for (size_t i = 0; i < m.size(); ++i) {
    m[i] = LoadWord(block + i * sizeof(uint64_t));
  }
  Words v{};
  std::copy(state_.begin(), state_.end(), v.begin());
  std::copy(kInitial.begin(), kInitial.end(), v.begin() + 8);
  v[12] ^= size_;
  v[14] = is_last ? ~v[14] : v[14];
  MixRounds(v, m, std::make_index_sequence<kRounds>());
  for (size_t i = 0; i < state_.size(); ++i) {
    state_[i] ^= v[i] ^ v[i + 8];
  }
}

void Blake2b::Update(const void *data, size_t size) {
  const auto *next = static_cast<const uint8_t *>(data);
  while (size > 0) {
    if (rest_size_ == kBlock) {
      Compress(rest_.data(), kBlock, false);
      rest_size_ = 0;
    }
    if (rest_size_ == 0) {
      for (; size > kBlock; next += kBlock, size -= kBlock) {
        Compress(next, kBlock, false);
      }
    }
    const size_t part = std::min(size, kBlock - rest_size_);
    std::memcpy(rest_.data() + rest_size_, next, part);
    rest_size_ += part;
    next += part;
    size -= part;
  }
}

Blake2b::Digest Blake2b::Finish() const {
  Blake2b last = *this;
  std::fill(last.rest_.begin() + static_cast<std::ptrdiff_t>(last.rest_size_), last.rest_.end(), uint8_t{0});
  last.Compress(last.rest_.data(), last.rest_size_, true);
  Digest digest{};
  for (size_t i = 0; i < digest.size(); ++i) {
    digest[i] = static_cast<uint8_t>(last.state_[i / sizeof(uint64_t)] >> (8 * (i % sizeof(uint64_t))));
  }
  return digest;
}

}  // namespace datadist
