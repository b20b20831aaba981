// Frames of the control connection.
//
//   header, 20 bytes, little-endian:  magic u32 | version u16 | type u16 | body_len u32 | seq u32 | crc32c u32
//   body:                             body_len bytes, see messages.h
//
// The checksum covers the header (its own field as zero) and the body. The length is checked against the cap of the
// type, and the type against what is legal in the state of the connection, before a byte of the body is allocated.
// Whatever is wrong with a frame, the connection is closed: there is no resynchronising.
#ifndef DATADIST_CONTROL_FRAME_H_
#define DATADIST_CONTROL_FRAME_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "base/deadline.h"
#include "base/status.h"

namespace datadist {

constexpr uint32_t kFrameMagic = 0x4B444444;  // "DDDK"
constexpr uint16_t kProtocolVersion = 3;
constexpr size_t kFrameHeaderSize = 20;
constexpr uint32_t kMaxFrameBody = 1U << 20;
// What is allocated for a body before any of it has come; then twice what has. An announcement costs its sender nothing.
constexpr size_t kFirstBodyBytes = 16U << 10;

enum class MessageType : uint16_t {
  kHello = 1,
  kWelcome = 2,
  kReject = 3,
  kReady = 4,
  kAttach = 5,
  kAttached = 6,
  kEstablished = 7,
  kPing = 8,
  kPong = 9,
  kDescribe = 10,
  kCacheInfo = 11,
  kPush = 12,
  kPushed = 13,
  kUnlink = 14,
  kUnlinked = 15,
  kConsume = 16,
  kConsumed = 17,
};
const char *MessageName(MessageType type);

// Largest body of a type: 4 KiB for all but CACHE_INFO and PUSH, which list an address per tensor.
uint32_t BodyCap(MessageType type);

// The messages that are legal in one state of a connection.
class TypeSet {
 public:
  template <typename... Types>
  constexpr explicit TypeSet(Types... types) : bits_((0U | ... | Bit(types))) {}
  constexpr bool Has(MessageType type) const { return (bits_ & Bit(type)) != 0; }
  constexpr void Add(MessageType type) { bits_ |= Bit(type); }

 private:
  static constexpr uint32_t Bit(MessageType type) { return 1U << static_cast<uint16_t>(type); }
  uint32_t bits_;
};

struct Frame {
  MessageType type = MessageType::kPing;
  uint32_t seq = 0;
  std::vector<uint8_t> body;
};

std::vector<uint8_t> EncodeFrame(MessageType type, uint32_t seq, const std::vector<uint8_t> &body);

// Assembles frames from a byte stream. Holds at most one frame.
class FrameReader {
 public:
  // Where the next bytes go and how many are wanted; never zero. Call Filled after reading some.
  uint8_t *next() { return in_body_ ? frame_.body.data() + filled_ : header_.data() + filled_; }
  size_t wanted() const { return (in_body_ ? frame_.body.size() : kFrameHeaderSize) - filled_; }

  // A frame when it is complete, no value while more is wanted, an error when the stream is not worth reading on.
  Result<std::optional<Frame>> Filled(size_t size, TypeSet legal);

  // Whether the stream stands between two frames.
  bool AtBoundary() const { return !in_body_ && filled_ == 0; }

 private:
  Status StartBody(TypeSet legal);
  Result<std::optional<Frame>> Finish();
  std::array<uint8_t, kFrameHeaderSize> header_{};
  Frame frame_;
  size_t filled_ = 0;
  size_t body_size_ = 0;  // as announced
  bool in_body_ = false;
};

// Blocking, for the dialling end.
Status SendFrame(int fd, MessageType type, uint32_t seq, const std::vector<uint8_t> &body, Deadline deadline);
Result<Frame> RecvFrame(int fd, TypeSet legal, Deadline deadline);

}  // namespace datadist

#endif  // DATADIST_CONTROL_FRAME_H_
