#include "control/frame.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "base/bytes.h"
#include "base/crc32c.h"
#include "base/socket_io.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;

constexpr size_t kCrcOffset = kFrameHeaderSize - sizeof(uint32_t);
constexpr uint32_t kSmallBody = 4096;
constexpr uint32_t kLeaseListBody = 4 + 4096 * 16;  // a count and so many tokens
constexpr uint32_t kRenewBody = kLeaseListBody + 1;  // and whether they are being pulled
// Who says it, a count, and so many tokens with their marks.
constexpr uint32_t kReportBody = 16 + 4 + 4 + 128 * (16 + 12 + 2 + 512);

uint32_t FrameCrc(const uint8_t *header, const std::vector<uint8_t> &body) {
  constexpr uint8_t kNoCrc[sizeof(uint32_t)] = {};
  const uint32_t fields = Crc32c(kNoCrc, sizeof(kNoCrc), Crc32c(header, kCrcOffset));
  return Crc32c(body.data(), body.size(), fields);
}

bool IsKnown(uint16_t type) {
  return type >= static_cast<uint16_t>(MessageType::kHello) && type <= static_cast<uint16_t>(MessageType::kDeclare);
}

// A peer of another version is told so in a REJECT, so these keep their place in every version.
bool IsVersionIndependent(MessageType type) {
  return type == MessageType::kHello || type == MessageType::kChannel || type == MessageType::kOpen ||
         type == MessageType::kReject;
}

}  // namespace

const char *MessageName(MessageType type) {
  switch (type) {
    case MessageType::kHello:
      return "HELLO";
    case MessageType::kWelcome:
      return "WELCOME";
    case MessageType::kReject:
      return "REJECT";
    case MessageType::kReady:
      return "READY";
    case MessageType::kAttach:
      return "ATTACH";
    case MessageType::kAttached:
      return "ATTACHED";
    case MessageType::kEstablished:
      return "ESTABLISHED";
    case MessageType::kPing:
      return "PING";
    case MessageType::kPong:
      return "PONG";
    case MessageType::kDescribe:
      return "DESCRIBE";
    case MessageType::kCacheInfo:
      return "CACHE_INFO";
    case MessageType::kPush:
      return "PUSH";
    case MessageType::kPushed:
      return "PUSHED";
    case MessageType::kUnlink:
      return "UNLINK";
    case MessageType::kUnlinked:
      return "UNLINKED";
    case MessageType::kConsume:
      return "CONSUME";
    case MessageType::kConsumed:
      return "CONSUMED";
    case MessageType::kOpen:
      return "OPEN";
    case MessageType::kOpened:
      return "OPENED";
    case MessageType::kProve:
      return "PROVE";
    case MessageType::kDigest:
      return "DIGEST";
    case MessageType::kDigests:
      return "DIGESTS";
    case MessageType::kChannel:
      return "CHANNEL";
    case MessageType::kChannelReady:
      return "CHANNEL_READY";
    case MessageType::kDescribeRank:
      return "DESCRIBE_RANK";
    case MessageType::kRank:
      return "RANK";
    case MessageType::kRenew:
      return "RENEW";
    case MessageType::kRenewed:
      return "RENEWED";
    case MessageType::kConfirm:
      return "CONFIRM";
    case MessageType::kConfirmed:
      return "CONFIRMED";
    case MessageType::kRelease:
      return "RELEASE";
    case MessageType::kReleased:
      return "RELEASED";
    case MessageType::kAwait:
      return "AWAIT";
    case MessageType::kHandoff:
      return "HANDOFF";
    case MessageType::kReport:
      return "REPORT";
    case MessageType::kReported:
      return "REPORTED";
    case MessageType::kOffer:
      return "OFFER";
    case MessageType::kOffered:
      return "OFFERED";
    case MessageType::kWatch:
      return "WATCH";
    case MessageType::kWatched:
      return "WATCHED";
    case MessageType::kDeliver:
      return "DELIVER";
    case MessageType::kSwitch:
      return "SWITCH";
    case MessageType::kSwitched:
      return "SWITCHED";
    case MessageType::kDeclare:
      return "DECLARE";
  }
  return "?";
}

uint32_t BodyCap(MessageType type) {
  switch (type) {
    case MessageType::kCacheInfo:
    case MessageType::kPush:
    case MessageType::kDigest:
    case MessageType::kDigests:
    case MessageType::kRank:
    case MessageType::kHandoff:
    case MessageType::kOffer:
    case MessageType::kWatched:
      return kMaxFrameBody;
    case MessageType::kRenew:
      return kRenewBody;
    case MessageType::kRenewed:
    case MessageType::kRelease:
      return kLeaseListBody;
    case MessageType::kReport:
      return kReportBody;
    default:
      return kSmallBody;
  }
}

std::array<uint8_t, kSealSize> FrameSeal::Next(const uint8_t *header, const std::vector<uint8_t> &body) {
  Writer sealed;
  sealed.Reserve(sizeof(count_) + kFrameHeaderSize + body.size());
  sealed.U64(count_++);
  sealed.Bytes(header, kFrameHeaderSize);
  sealed.Bytes(body.data(), body.size());
  const Digest digest = HmacSha256(*key_, sealed.data(), sealed.size());
  std::array<uint8_t, kSealSize> seal{};
  std::copy_n(digest.begin(), seal.size(), seal.begin());
  return seal;
}

std::vector<uint8_t> EncodeFrame(MessageType type, uint32_t seq, const std::vector<uint8_t> &body, FrameSeal *seal) {
  Writer writer;
  writer.Reserve(kFrameHeaderSize + body.size() + kSealSize);
  writer.U32(kFrameMagic);
  writer.U16(kProtocolVersion);
  writer.U16(static_cast<uint16_t>(type));
  writer.U32(static_cast<uint32_t>(body.size()));
  writer.U32(seq);
  writer.U32(0);
  writer.PatchU32(kCrcOffset, FrameCrc(writer.data(), body));
  writer.Bytes(body.data(), body.size());
  if (seal != nullptr && seal->size() > 0) {
    const auto bytes = seal->Next(writer.data(), body);
    writer.Bytes(bytes.data(), bytes.size());
  }
  return writer.Take();
}

uint8_t *FrameReader::next() {
  switch (part_) {
    case Part::kBody:
      return frame_.body.data() + filled_;
    case Part::kSeal:
      return received_seal_.data() + filled_;
    case Part::kHeader:
      break;
  }
  return header_.data() + filled_;
}

size_t FrameReader::wanted() const {
  switch (part_) {
    case Part::kBody:
      return frame_.body.size() - filled_;
    case Part::kSeal:
      return seal_.size() - filled_;
    case Part::kHeader:
      break;
  }
  return kFrameHeaderSize - filled_;
}

void FrameReader::StartPart(Part part) {
  part_ = part;
  filled_ = 0;
}

Status FrameReader::StartBody(TypeSet legal) {
  Reader reader(header_.data(), header_.size());
  const uint32_t magic = reader.U32();
  const uint16_t version = reader.U16();
  const uint16_t type = reader.U16();
  const uint32_t body_len = reader.U32();
  frame_.seq = reader.U32();
  if (magic != kFrameMagic) {
    return Status(LLM_FAILED, "not a frame of this protocol (bad magic)");
  }
  if (!IsKnown(type)) {
    return Status(LLM_FAILED, "unknown message type " + std::to_string(type));
  }
  frame_.type = static_cast<MessageType>(type);
  if (!legal.Has(frame_.type)) {
    return Status(LLM_FAILED, std::string(MessageName(frame_.type)) + " is not legal in this state");
  }
  if (version != kProtocolVersion && !IsVersionIndependent(frame_.type)) {
    return Status(LLM_FAILED, "frame of protocol version " + std::to_string(version) + ", expected " +
                                  std::to_string(kProtocolVersion));
  }
  if (body_len > BodyCap(frame_.type)) {
    return Status(LLM_FAILED, std::string(MessageName(frame_.type)) + " of " + std::to_string(body_len) +
                                  " bytes, at most " + std::to_string(BodyCap(frame_.type)));
  }
  body_size_ = body_len;
  frame_.body.resize(std::min(body_size_, kFirstBodyBytes));
  StartPart(Part::kBody);
  return Status::Ok();
}

Result<std::optional<Frame>> FrameReader::Finish() {
  const uint32_t expected = Reader(header_.data() + kCrcOffset, sizeof(uint32_t)).U32();
  if (FrameCrc(header_.data(), frame_.body) != expected) {
    return Status(LLM_FAILED, std::string(MessageName(frame_.type)) + " with a wrong checksum");
  }
  if (seal_.size() > 0 && !SameBytes(seal_.Next(header_.data(), frame_.body), received_seal_)) {
    return Status(LLM_FAILED, std::string(MessageName(frame_.type)) + " with a wrong seal");
  }
  StartPart(Part::kHeader);
  return std::optional<Frame>(std::exchange(frame_, Frame()));
}

Result<std::optional<Frame>> FrameReader::Filled(size_t size, TypeSet legal) {
  filled_ += size;
  if (wanted() > 0) {
    return std::optional<Frame>();
  }
  if (part_ == Part::kHeader) {
    if (Status status = StartBody(legal); !status.ok()) {
      return status;
    }
    if (wanted() > 0) {
      return std::optional<Frame>();
    }
  }
  if (part_ == Part::kBody) {
    if (frame_.body.size() < body_size_) {
      frame_.body.resize(std::min(body_size_, 2 * frame_.body.size()));
      return std::optional<Frame>();
    }
    if (seal_.size() > 0) {
      StartPart(Part::kSeal);
      return std::optional<Frame>();
    }
  }
  return Finish();
}

Status SendFrame(FrameSocket &socket, MessageType type, uint32_t seq, const std::vector<uint8_t> &body,
                 Deadline deadline) {
  const std::vector<uint8_t> bytes = EncodeFrame(type, seq, body, &socket.out);
  return SendAll(socket.fd.get(), bytes.data(), bytes.size(), deadline);
}

Result<Frame> RecvFrame(FrameSocket &socket, TypeSet legal, Deadline deadline) {
  FrameReader reader(socket.in);
  while (true) {
    const size_t size = reader.wanted();
    if (Status status = RecvAll(socket.fd.get(), reader.next(), size, deadline); !status.ok()) {
      return status;
    }
    Result<std::optional<Frame>> frame = reader.Filled(size, legal);
    if (!frame.ok()) {
      return frame.status();
    }
    if (frame.value().has_value()) {
      socket.in = reader.seal();
      return *std::move(frame).value();
    }
  }
}

}  // namespace datadist
