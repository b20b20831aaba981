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

uint32_t FrameCrc(const uint8_t *header, const std::vector<uint8_t> &body) {
  constexpr uint8_t kNoCrc[sizeof(uint32_t)] = {};
  const uint32_t fields = Crc32c(kNoCrc, sizeof(kNoCrc), Crc32c(header, kCrcOffset));
  return Crc32c(body.data(), body.size(), fields);
}

bool IsKnown(uint16_t type) {
  return type >= static_cast<uint16_t>(MessageType::kHello) && type <= static_cast<uint16_t>(MessageType::kConsumed);
}

// A peer of another version is told so in a REJECT, so these two keep their place in every version.
bool IsVersionIndependent(MessageType type) { return type == MessageType::kHello || type == MessageType::kReject; }

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
  }
  return "?";
}

uint32_t BodyCap(MessageType type) {
  return type == MessageType::kCacheInfo || type == MessageType::kPush ? kMaxFrameBody : kSmallBody;
}

std::vector<uint8_t> EncodeFrame(MessageType type, uint32_t seq, const std::vector<uint8_t> &body) {
  Writer writer;
  writer.Reserve(kFrameHeaderSize + body.size());
  writer.U32(kFrameMagic);
  writer.U16(kProtocolVersion);
  writer.U16(static_cast<uint16_t>(type));
  writer.U32(static_cast<uint32_t>(body.size()));
  writer.U32(seq);
  writer.U32(0);
  writer.PatchU32(kCrcOffset, FrameCrc(writer.data(), body));
  writer.Bytes(body.data(), body.size());
  return writer.Take();
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
  in_body_ = true;
  filled_ = 0;
  return Status::Ok();
}

Result<std::optional<Frame>> FrameReader::Finish() {
  const uint32_t expected = Reader(header_.data() + kCrcOffset, sizeof(uint32_t)).U32();
  if (FrameCrc(header_.data(), frame_.body) != expected) {
    return Status(LLM_FAILED, std::string(MessageName(frame_.type)) + " with a wrong checksum");
  }
  in_body_ = false;
  filled_ = 0;
  return std::optional<Frame>(std::exchange(frame_, Frame()));
}

Result<std::optional<Frame>> FrameReader::Filled(size_t size, TypeSet legal) {
  filled_ += size;
  if (wanted() > 0) {
    return std::optional<Frame>();
  }
  if (!in_body_) {
    if (Status status = StartBody(legal); !status.ok()) {
      return status;
    }
    if (wanted() > 0) {
      return std::optional<Frame>();
    }
  }
  if (frame_.body.size() < body_size_) {
    frame_.body.resize(std::min(body_size_, 2 * frame_.body.size()));
    return std::optional<Frame>();
  }
  return Finish();
}

Status SendFrame(int fd, MessageType type, uint32_t seq, const std::vector<uint8_t> &body, Deadline deadline) {
  const std::vector<uint8_t> bytes = EncodeFrame(type, seq, body);
  return SendAll(fd, bytes.data(), bytes.size(), deadline);
}

Result<Frame> RecvFrame(int fd, TypeSet legal, Deadline deadline) {
  FrameReader reader;
  while (true) {
    const size_t size = reader.wanted();
    if (Status status = RecvAll(fd, reader.next(), size, deadline); !status.ok()) {
      return status;
    }
    Result<std::optional<Frame>> frame = reader.Filled(size, legal);
    if (!frame.ok()) {
      return frame.status();
    }
    if (frame.value().has_value()) {
      return *std::move(frame).value();
    }
  }
}

}  // namespace datadist
