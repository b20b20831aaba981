// Little-endian encoding and decoding of what crosses the wire.
#ifndef DATADIST_BASE_BYTES_H_
#define DATADIST_BASE_BYTES_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace datadist {

class Writer {
 public:
  void U8(uint8_t value) { bytes_.push_back(value); }
  void U16(uint16_t value) { Append(value, sizeof(value)); }
  void U32(uint32_t value) { Append(value, sizeof(value)); }
  void U64(uint64_t value) { Append(value, sizeof(value)); }
  void I32(int32_t value) { U32(static_cast<uint32_t>(value)); }
  void I64(int64_t value) { U64(static_cast<uint64_t>(value)); }
  void Bytes(const void *data, size_t size);
  // u16 length, then the bytes. Longer texts are cut: a text is for people, and must not make a message unsendable.
  void Text(std::string_view text, size_t max_size);
  // Overwrites four bytes written before: for lengths and checksums known only at the end.
  void PatchU32(size_t offset, uint32_t value);

  void Reserve(size_t size) { bytes_.reserve(size); }
  size_t size() const { return bytes_.size(); }
  const uint8_t *data() const { return bytes_.data(); }
  std::vector<uint8_t> Take() { return std::move(bytes_); }

 private:
  void Append(uint64_t value, size_t size);
  std::vector<uint8_t> bytes_;
};

// Reads from bytes that it does not own. The first read past the end makes the reader fail for good: that and all later
// reads give zeros, so that a decoder may read a whole message and ask ok() once, before it uses any value.
class Reader {
 public:
  Reader(const void *data, size_t size) : next_(static_cast<const uint8_t *>(data)), left_(size) {}

  uint8_t U8() { return static_cast<uint8_t>(Take(sizeof(uint8_t))); }
  uint16_t U16() { return static_cast<uint16_t>(Take(sizeof(uint16_t))); }
  uint32_t U32() { return static_cast<uint32_t>(Take(sizeof(uint32_t))); }
  uint64_t U64() { return Take(sizeof(uint64_t)); }
  int32_t I32() { return static_cast<int32_t>(U32()); }
  int64_t I64() { return static_cast<int64_t>(U64()); }
  void Bytes(void *out, size_t size);
  // A text longer than max_size fails the reader.
  std::string Text(size_t max_size);

  bool ok() const { return ok_; }
  size_t remaining() const { return left_; }
  // True when everything was read and nothing is left: trailing bytes are an error of the sender.
  bool Finished() const { return ok_ && left_ == 0; }

 private:
  uint64_t Take(size_t size);
  bool Claim(size_t size);
  const uint8_t *next_;
  size_t left_;
  bool ok_ = true;
};

}  // namespace datadist

#endif  // DATADIST_BASE_BYTES_H_
