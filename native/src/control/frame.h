// Frames of control connections and of the channel.
//
//   header, 20 bytes, little-endian:  magic u32 | version u16 | type u16 | body_len u32 | seq u32 | crc32c u32
//   body:                             body_len bytes, see messages.h and channel/messages.h
//   seal, 16 bytes:                   on connections that were opened by a key, see opening.h
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
#include <utility>
#include <vector>

#include "base/deadline.h"
#include "base/fd.h"
#include "base/hmac.h"
#include "base/status.h"

namespace datadist {

constexpr uint32_t kFrameMagic = 0x4B444444;  // "DDDK"
constexpr uint16_t kProtocolVersion = 9;
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
  kOpen = 18,
  kOpened = 19,
  kProve = 20,
  kDigest = 21,
  kDigests = 22,
  kChannel = 23,
  kChannelReady = 24,
  kDescribeRank = 25,
  kRank = 26,
  kRenew = 27,
  kRenewed = 28,
  kConfirm = 29,
  kConfirmed = 30,
  kRelease = 31,
  kReleased = 32,
  kAwait = 33,
  kHandoff = 34,
  kReport = 35,
  kReported = 36,
  kOffer = 37,
  kOffered = 38,
  kWatch = 39,
  kWatched = 40,
  kDeliver = 41,
  kSwitch = 42,
  kSwitched = 43,
  kDeclare = 44,
};
const char *MessageName(MessageType type);

// Largest body of a type: 4 KiB for all but those that list something per tensor, block or lease, and those that
// have a blob.
uint32_t BodyCap(MessageType type);

// The messages that are legal in one state of a connection.
class TypeSet {
 public:
  template <typename... Types>
  constexpr explicit TypeSet(Types... types) : bits_((uint64_t{0} | ... | Bit(types))) {}
  constexpr bool Has(MessageType type) const { return (bits_ & Bit(type)) != 0; }
  constexpr void Add(MessageType type) { bits_ |= Bit(type); }

 private:
  static constexpr uint64_t Bit(MessageType type) { return uint64_t{1} << static_cast<uint16_t>(type); }
  uint64_t bits_;
};

struct Frame {
  MessageType type = MessageType::kPing;
  uint32_t seq = 0;
  std::vector<uint8_t> body;
};

constexpr size_t kSealSize = 16;

// Says of the frames of one direction that they come from who knows the key, in their order and none of them twice.
class FrameSeal {
 public:
  FrameSeal() = default;  // none: frames have their checksum only
  explicit FrameSeal(const Digest &key) : key_(key) {}

  size_t size() const { return key_.has_value() ? kSealSize : 0; }
  // Of the next frame; only where size() is not zero.
  std::array<uint8_t, kSealSize> Next(const uint8_t *header, const std::vector<uint8_t> &body);

 private:
  std::optional<Digest> key_;
  uint64_t count_ = 0;
};

std::vector<uint8_t> EncodeFrame(MessageType type, uint32_t seq, const std::vector<uint8_t> &body,
                                 FrameSeal *seal = nullptr);

// Assembles frames from a byte stream. Holds at most one frame.
class FrameReader {
 public:
  explicit FrameReader(FrameSeal seal = {}) : seal_(std::move(seal)) {}

  // All frames from now on have this seal. Between two frames only.
  void Expect(FrameSeal seal) { seal_ = std::move(seal); }
  const FrameSeal &seal() const { return seal_; }

  // Where the next bytes go and how many are wanted; never zero. Call Filled after reading some.
  uint8_t *next();
  size_t wanted() const;

  // A frame when it is complete, no value while more is wanted, an error when the stream is not worth reading on.
  Result<std::optional<Frame>> Filled(size_t size, TypeSet legal);

  // Whether the stream stands between two frames.
  bool AtBoundary() const { return part_ == Part::kHeader && filled_ == 0; }

 private:
  enum class Part : uint8_t { kHeader, kBody, kSeal };
  Status StartBody(TypeSet legal);
  void StartPart(Part part);
  Result<std::optional<Frame>> Finish();
  std::array<uint8_t, kFrameHeaderSize> header_{};
  std::array<uint8_t, kSealSize> received_seal_{};
  Frame frame_;
  Part part_ = Part::kHeader;
  size_t filled_ = 0;     // of the part
  size_t body_size_ = 0;  // as announced
  FrameSeal seal_;
};

// A connected socket and the seals of both directions.
struct FrameSocket {
  FrameSocket() = default;
  FrameSocket(Fd connection) : fd(std::move(connection)) {}  // NOLINT: a socket is one without seals
  Fd fd;
  FrameSeal in;
  FrameSeal out;
};

// Blocking, for the dialling end.
Status SendFrame(FrameSocket &socket, MessageType type, uint32_t seq, const std::vector<uint8_t> &body,
                 Deadline deadline);
Result<Frame> RecvFrame(FrameSocket &socket, TypeSet legal, Deadline deadline);

}  // namespace datadist

#endif  // DATADIST_CONTROL_FRAME_H_
