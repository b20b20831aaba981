// BLAKE2b (RFC 7693) without a key, cut to 16 bytes: Python's hashlib.blake2b(digest_size=16).
#ifndef DATADIST_BASE_BLAKE2B_H_
#define DATADIST_BASE_BLAKE2B_H_

#include <array>
#include <cstddef>
#include <cstdint>

namespace datadist {

class Blake2b {
 public:
  using Digest = std::array<uint8_t, 16>;

  Blake2b();
  void Update(const void *data, size_t size);
  // Bytes so far.
  uint64_t size() const { return size_ + rest_size_; }
  // Of all bytes so far; more may follow.
  Digest Finish() const;

 private:
  static constexpr size_t kBlock = 128;
  using Block = std::array<uint8_t, kBlock>;

  void Compress(const uint8_t *block, size_t num_new, bool is_last);

  std::array<uint64_t, 8> state_{};
  uint64_t size_ = 0;  // of what is in state_; beyond 2^64 bytes nobody counts
  Block rest_{};       // not in it yet: the last block is compressed in another way, and may be a whole one
  size_t rest_size_ = 0;
};

}  // namespace datadist

#endif  // DATADIST_BASE_BLAKE2B_H_
