#include "control/messages.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "base/bytes.h"
#include "control/frame.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_SUCCESS;

constexpr size_t kMaxText = 1024;
constexpr size_t kMaxBootId = 64;
constexpr uint16_t kMaxTcpStreams = 16;
// What fits into the largest frame beside the fixed fields; far above any limit on registrations.
constexpr uint32_t kMaxTensors = (kMaxFrameBody - 4096) / sizeof(uint64_t);

Status Malformed(const char *message) { return Status(LLM_FAILED, std::string("malformed ") + message); }

template <size_t N>
void Put(Writer &writer, const std::array<uint8_t, N> &bytes) {
  writer.Bytes(bytes.data(), bytes.size());
}

template <size_t N>
void Get(Reader &reader, std::array<uint8_t, N> &bytes) {
  reader.Bytes(bytes.data(), bytes.size());
}

void Put(Writer &writer, const EndpointInfo &info) {
  writer.U64(info.cluster_id);
  writer.I32(info.role);
  Put(writer, info.incarnation);
  writer.Text(info.host.boot_id, kMaxBootId);
  writer.U64(info.host.pid_namespace);
  writer.I32(info.host.pid);
  writer.U64(info.slot_addr);
  Put(writer, info.challenge);
  writer.U16(info.tcp_streams);
}

bool Get(Reader &reader, EndpointInfo &info) {
  info.cluster_id = reader.U64();
  info.role = reader.I32();
  Get(reader, info.incarnation);
  info.host.boot_id = reader.Text(kMaxBootId);
  info.host.pid_namespace = reader.U64();
  info.host.pid = reader.I32();
  info.slot_addr = reader.U64();
  Get(reader, info.challenge);
  info.tcp_streams = reader.U16();
  return reader.ok() && info.role >= 1 && info.role <= 3 && info.host.pid >= 0 && info.tcp_streams >= 1 &&
         info.tcp_streams <= kMaxTcpStreams;
}

void Put(Writer &writer, const Status &status) {
  writer.U32(status.code());
  writer.Text(status.text(), kMaxText);
}

Status GetStatus(Reader &reader) {
  const uint32_t code = reader.U32();
  std::string text = reader.Text(kMaxText);
  return code == LLM_SUCCESS ? Status::Ok() : Status(code, std::move(text));
}

bool IsTransport(uint8_t kind) {
  return kind >= static_cast<uint8_t>(TransportKind::kLocal) && kind <= static_cast<uint8_t>(TransportKind::kTcp);
}

void Put(Writer &writer, const RemoteCache &cache) {
  writer.I64(cache.cache_id);
  writer.U64(cache.generation);
  writer.U32(static_cast<uint32_t>(cache.geometry.placement));
  writer.U32(cache.geometry.num_tensors);
  writer.U64(cache.geometry.num_blocks);
  writer.U64(cache.geometry.tensor_bytes);
  writer.U64(cache.geometry.stride);
  writer.U64(cache.stamp_addr);
  writer.U32(static_cast<uint32_t>(cache.tensor_addrs.size()));
  for (const uint64_t addr : cache.tensor_addrs) {
    writer.U64(addr);
  }
}

bool Get(Reader &reader, RemoteCache &cache) {
  CacheGeometry &geometry = cache.geometry;
  cache.cache_id = reader.I64();
  cache.generation = reader.U64();
  geometry.placement = static_cast<llm_datadist::CachePlacement>(reader.U32());
  geometry.num_tensors = reader.U32();
  geometry.num_blocks = reader.U64();
  geometry.tensor_bytes = reader.U64();
  geometry.stride = reader.U64();
  cache.stamp_addr = reader.U64();
  const uint32_t addr_count = reader.U32();
  // Both counts decide how much is allocated and copied; compare them with what is really there first.
  if (!reader.ok() || (addr_count != 0 && addr_count != geometry.num_tensors) ||
      addr_count > reader.remaining() / sizeof(uint64_t) || geometry.num_tensors == 0 ||
      geometry.num_tensors > kMaxTensors || geometry.num_blocks == 0 ||
      geometry.stride != geometry.tensor_bytes / geometry.num_blocks) {
    return false;
  }
  cache.tensor_addrs.resize(addr_count);
  for (uint64_t &addr : cache.tensor_addrs) {
    addr = reader.U64();
  }
  return reader.ok();
}

}  // namespace

uint32_t RemainingMillis(Deadline deadline) {
  return static_cast<uint32_t>(std::min<int64_t>(deadline.Remaining().count(), std::numeric_limits<uint32_t>::max()));
}

std::vector<uint8_t> Encode(const Hello &message) {
  Writer writer;
  writer.U16(message.versions.lowest);
  writer.U16(message.versions.highest);
  Put(writer, message.client);
  writer.U32(message.remaining_ms);
  writer.U8(message.force_link ? 1 : 0);
  return writer.Take();
}

Result<VersionRange> DecodeVersionRange(const std::vector<uint8_t> &hello_body) {
  Reader reader(hello_body.data(), hello_body.size());
  VersionRange range;
  range.lowest = reader.U16();
  range.highest = reader.U16();
  if (!reader.ok() || range.lowest > range.highest) {
    return Malformed("HELLO");
  }
  return range;
}

template <>
Result<Hello> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  Hello message;
  message.versions.lowest = reader.U16();
  message.versions.highest = reader.U16();
  const bool client_ok = Get(reader, message.client);
  message.remaining_ms = reader.U32();
  const uint8_t force = reader.U8();
  message.force_link = force == 1;
  if (!client_ok || !reader.Finished() || force > 1) {
    return Malformed("HELLO");
  }
  return message;
}

std::vector<uint8_t> Encode(const Welcome &message) {
  Writer writer;
  Put(writer, message.server);
  Put(writer, message.token);
  return writer.Take();
}

template <>
Result<Welcome> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  Welcome message;
  const bool server_ok = Get(reader, message.server);
  Get(reader, message.token);
  if (!server_ok || !reader.Finished()) {
    return Malformed("WELCOME");
  }
  return message;
}

std::vector<uint8_t> Encode(const Reject &message) {
  Writer writer;
  Put(writer, message.status);
  return writer.Take();
}

template <>
Result<Reject> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  Reject message{GetStatus(reader)};
  if (!reader.Finished() || message.status.ok()) {
    return Malformed("REJECT");
  }
  return message;
}

std::vector<uint8_t> Encode(const Ready &message) {
  Writer writer;
  writer.U8(static_cast<uint8_t>(message.transport));
  writer.Text(message.reason, kMaxText);
  return writer.Take();
}

template <>
Result<Ready> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  const uint8_t transport = reader.U8();
  Ready message;
  message.reason = reader.Text(kMaxText);
  if (!reader.Finished() || !IsTransport(transport)) {
    return Malformed("READY");
  }
  message.transport = static_cast<TransportKind>(transport);
  return message;
}

std::vector<uint8_t> Encode(const Attach &message) {
  Writer writer;
  Put(writer, message.token);
  writer.U8(static_cast<uint8_t>(message.initiator));
  writer.U16(message.index);
  return writer.Take();
}

template <>
Result<Attach> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  Attach message;
  Get(reader, message.token);
  const uint8_t initiator = reader.U8();
  message.index = reader.U16();
  const bool known = initiator == static_cast<uint8_t>(Initiator::kClient) ||
                     initiator == static_cast<uint8_t>(Initiator::kServer);
  if (!reader.Finished() || message.index >= kMaxTcpStreams || !known) {
    return Malformed("ATTACH");
  }
  message.initiator = static_cast<Initiator>(initiator);
  return message;
}

std::vector<uint8_t> Encode(const DescribeRequest &message) {
  Writer writer;
  writer.I64(message.cache_id);
  return writer.Take();
}

template <>
Result<DescribeRequest> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  const DescribeRequest message{reader.I64()};
  if (!reader.Finished()) {
    return Malformed("DESCRIBE");
  }
  return message;
}

std::vector<uint8_t> Encode(const CacheInfo &message) {
  Writer writer;
  Put(writer, message.status);
  if (message.status.ok()) {
    Put(writer, message.cache);
  }
  return writer.Take();
}

template <>
Result<CacheInfo> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  CacheInfo message;
  message.status = GetStatus(reader);
  if (!reader.ok() || (message.status.ok() && !Get(reader, message.cache)) || !reader.Finished()) {
    return Malformed("CACHE_INFO");
  }
  return message;
}

std::vector<uint8_t> Encode(const AcquireWriteRequest &message) {
  Writer writer;
  writer.I64(message.cache_id);
  writer.U64(message.generation);
  writer.U32(message.first_tensor);
  writer.U32(message.tensor_count);
  writer.U64(message.end);
  writer.U32(message.remaining_ms);
  return writer.Take();
}

template <>
Result<AcquireWriteRequest> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  AcquireWriteRequest message;
  message.cache_id = reader.I64();
  message.generation = reader.U64();
  message.first_tensor = reader.U32();
  message.tensor_count = reader.U32();
  message.end = reader.U64();
  message.remaining_ms = reader.U32();
  if (!reader.Finished()) {
    return Malformed("ACQUIRE_WRITE");
  }
  return message;
}

std::vector<uint8_t> Encode(const Grant &message) {
  Writer writer;
  Put(writer, message.status);
  writer.U64(message.grant);
  return writer.Take();
}

template <>
Result<Grant> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  Grant message;
  message.status = GetStatus(reader);
  message.grant = reader.U64();
  if (!reader.Finished()) {
    return Malformed("GRANT");
  }
  return message;
}

std::vector<uint8_t> Encode(const ReleaseWriteRequest &message) {
  Writer writer;
  writer.U64(message.grant);
  return writer.Take();
}

template <>
Result<ReleaseWriteRequest> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  const ReleaseWriteRequest message{reader.U64()};
  if (!reader.Finished()) {
    return Malformed("RELEASE_WRITE");
  }
  return message;
}

std::vector<uint8_t> Encode(const UnlinkRequest &message) {
  Writer writer;
  writer.U64(message.cluster_id);
  Put(writer, message.token);
  return writer.Take();
}

template <>
Result<UnlinkRequest> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  UnlinkRequest message;
  message.cluster_id = reader.U64();
  Get(reader, message.token);
  if (!reader.Finished()) {
    return Malformed("UNLINK");
  }
  return message;
}

Status DecodeEmpty(const std::vector<uint8_t> &body) {
  return body.empty() ? Status::Ok() : Malformed("message: a body where none belongs");
}

}  // namespace datadist
