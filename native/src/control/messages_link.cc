// The messages of an established link.
#include <algorithm>

#include "control/frame.h"
#include "control/message_fields.h"
#include "control/messages.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_KV_CACHE_NOT_EXIST;
using llm_datadist::LLM_PARAM_INVALID;
using llm_datadist::LLM_TIMEOUT;

static_assert(kMaxCacheBlob + kMaxPushRuns * sizeof(Run) + 4096 <= kMaxFrameBody, "a PUSH may have both");

void Put(Writer &writer, const CacheKey &key) {
  writer.U8(static_cast<uint8_t>(key.kind));
  writer.U64(key.id);
  writer.U64(key.model_id);
}

bool Get(Reader &reader, CacheKey &key) {
  const uint8_t kind = reader.U8();
  key.kind = static_cast<KeyKind>(kind);
  key.id = reader.U64();
  key.model_id = reader.U64();
  return reader.ok() && kind >= static_cast<uint8_t>(KeyKind::kRequest) &&
         kind <= static_cast<uint8_t>(KeyKind::kBlocks);
}

void Put(Writer &writer, const CacheGeometry &geometry) {
  writer.U32(static_cast<uint32_t>(geometry.placement));
  writer.U8(static_cast<uint8_t>(geometry.layout));
  writer.U32(geometry.num_tensors);
  writer.U64(std::max(geometry.batch_size, geometry.num_blocks));
  writer.U64(geometry.tensor_bytes);
  writer.U8(geometry.tensors_overlap ? 1 : 0);
}

bool Get(Reader &reader, CacheGeometry &geometry) {
  geometry.placement = static_cast<llm_datadist::CachePlacement>(reader.U32());
  const uint8_t layout = reader.U8();
  geometry.num_tensors = reader.U32();
  const uint64_t rows = reader.U64();
  geometry.tensor_bytes = reader.U64();
  const uint8_t overlap = reader.U8();
  geometry.tensors_overlap = overlap == 1;
  if (!reader.ok() || overlap > 1 || layout > static_cast<uint8_t>(CacheLayout::kBlocks) || geometry.num_tensors == 0 ||
      geometry.num_tensors > kMaxTensorsPerCache || rows == 0) {
    return false;
  }
  geometry.layout = static_cast<CacheLayout>(layout);
  geometry.batch_size = geometry.layout == CacheLayout::kBlocks ? 1 : rows;
  geometry.num_blocks = geometry.layout == CacheLayout::kContiguous ? 0 : rows;
  geometry.stride = geometry.tensor_bytes / rows;
  return true;
}

void Put(Writer &writer, const RemoteCache &cache) {
  writer.I64(cache.cache_id);
  writer.U64(cache.generation);
  Put(writer, cache.geometry);
  writer.U32(static_cast<uint32_t>(cache.blob.size()));
  writer.Bytes(cache.blob.data(), cache.blob.size());
}

bool Get(Reader &reader, RemoteCache &cache) {
  cache.cache_id = reader.I64();
  cache.generation = reader.U64();
  const bool geometry_ok = Get(reader, cache.geometry);
  const uint32_t size = reader.U32();
  // It decides how much is allocated and copied; compare it with what is really there first.
  if (!geometry_ok || !reader.ok() || size > kMaxCacheBlob || size > reader.remaining()) {
    return false;
  }
  cache.blob.resize(size);
  reader.Bytes(cache.blob.data(), size);
  return true;
}

void Put(Writer &writer, const RemoteTarget &target) {
  Put(writer, target.cache);
  writer.U8(target.has_row ? 1 : 0);
  writer.U32(target.row);
  writer.U32(target.tensor);
  writer.U64(target.offset);
  writer.U8(target.lasting ? 1 : 0);
}

bool Get(Reader &reader, RemoteTarget &target) {
  const bool cache_ok = Get(reader, target.cache);
  const uint8_t has_row = reader.U8();
  target.row = reader.U32();
  target.tensor = reader.U32();
  target.offset = reader.U64();
  const uint8_t lasting = reader.U8();
  target.has_row = has_row == 1;
  target.lasting = lasting == 1;
  // What the initiator will compute with must lie inside what it was told of the cache.
  const CacheGeometry &geometry = target.cache.geometry;
  return cache_ok && reader.ok() && has_row <= 1 && lasting <= 1 && target.row < geometry.batch_size &&
         target.tensor < geometry.num_tensors && target.offset <= geometry.tensor_bytes;
}

}  // namespace

std::vector<uint8_t> Encode(const DescribeRequest &message) {
  Writer writer;
  writer.U8(static_cast<uint8_t>(message.ref.by));
  writer.I64(message.ref.cache_id);
  Put(writer, message.ref.key);
  writer.U64(message.ref.address);
  writer.U64(message.ref.length);
  return writer.Take();
}

template <>
Result<DescribeRequest> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  DescribeRequest message;
  const uint8_t by = reader.U8();
  message.ref.cache_id = reader.I64();
  const bool key_ok = Get(reader, message.ref.key);
  message.ref.address = reader.U64();
  message.ref.length = reader.U64();
  if (!key_ok || !reader.Finished() || by < static_cast<uint8_t>(CacheRef::By::kId) ||
      by > static_cast<uint8_t>(CacheRef::By::kAddress)) {
    return Malformed("DESCRIBE");
  }
  message.ref.by = static_cast<CacheRef::By>(by);
  return message;
}

std::vector<uint8_t> Encode(const CacheInfo &message) {
  Writer writer;
  Put(writer, message.status);
  if (message.status.ok()) {
    Put(writer, message.target);
  }
  return writer.Take();
}

template <>
Result<CacheInfo> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  CacheInfo message;
  const auto status = GetStatus(reader, {LLM_KV_CACHE_NOT_EXIST, LLM_PARAM_INVALID});
  if (!status.has_value() || (status->ok() && !Get(reader, message.target)) || !reader.Finished()) {
    return Malformed("CACHE_INFO");
  }
  message.status = *status;
  return message;
}

std::vector<uint8_t> Encode(const ConsumeRequest &message) {
  Writer writer;
  Put(writer, message.key);
  writer.U64(message.generation);
  writer.U32(message.first_tensor);
  writer.U32(message.tensor_count);
  return writer.Take();
}

template <>
Result<ConsumeRequest> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  ConsumeRequest message;
  const bool key_ok = Get(reader, message.key);
  message.generation = reader.U64();
  message.first_tensor = reader.U32();
  message.tensor_count = reader.U32();
  if (!key_ok || !reader.Finished()) {
    return Malformed("CONSUME");
  }
  return message;
}

std::vector<uint8_t> Encode(const Consumed &message) {
  Writer writer;
  Put(writer, message.status);
  return writer.Take();
}

template <>
Result<Consumed> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  const auto status = GetStatus(reader, {LLM_KV_CACHE_NOT_EXIST, LLM_PARAM_INVALID});
  if (!status.has_value() || !reader.Finished()) {
    return Malformed("CONSUMED");
  }
  return Consumed{*status};
}

std::vector<uint8_t> Encode(const PushRequest &message) {
  Writer writer;
  writer.I64(message.cache_id);
  writer.U64(message.generation);
  writer.U32(message.first_tensor);
  Put(writer, message.source);
  writer.U32(message.source_first_tensor);
  writer.U32(message.tensor_count);
  writer.U32(message.remaining_ms);
  writer.U32(static_cast<uint32_t>(message.runs.size()));
  for (const Run &run : message.runs) {
    writer.U64(run.remote_offset);
    writer.U64(run.local_offset);
    writer.U64(run.length);
  }
  return writer.Take();
}

template <>
Result<PushRequest> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  PushRequest message;
  message.cache_id = reader.I64();
  message.generation = reader.U64();
  message.first_tensor = reader.U32();
  const bool source_ok = Get(reader, message.source);
  message.source_first_tensor = reader.U32();
  message.tensor_count = reader.U32();
  message.remaining_ms = reader.U32();
  const uint32_t runs = reader.U32();
  if (!source_ok || !reader.ok() || runs > kMaxPushRuns || runs > reader.remaining() / sizeof(Run)) {
    return Malformed("PUSH");
  }
  message.runs.resize(runs);
  for (Run &run : message.runs) {
    run.remote_offset = reader.U64();
    run.local_offset = reader.U64();
    run.length = reader.U64();
  }
  if (!reader.Finished()) {
    return Malformed("PUSH");
  }
  return message;
}

std::vector<uint8_t> Encode(const Pushed &message) {
  Writer writer;
  Put(writer, message.status);
  return writer.Take();
}

template <>
Result<Pushed> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  const auto status = GetStatus(reader, {LLM_KV_CACHE_NOT_EXIST, LLM_PARAM_INVALID, LLM_TIMEOUT, LLM_FAILED});
  if (!status.has_value() || !reader.Finished()) {
    return Malformed("PUSHED");
  }
  return Pushed{*status};
}

std::vector<uint8_t> Encode(const DigestRequest &message) {
  Writer writer;
  writer.I64(message.cache_id);
  writer.U64(message.generation);
  writer.U32(message.first_tensor);
  writer.U32(message.tensor_count);
  writer.U32(message.remaining_ms);
  writer.U32(static_cast<uint32_t>(message.ranges.size()));
  for (const Span &range : message.ranges) {
    writer.U64(range.offset);
    writer.U64(range.length);
  }
  return writer.Take();
}

template <>
Result<DigestRequest> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  DigestRequest message;
  message.cache_id = reader.I64();
  message.generation = reader.U64();
  message.first_tensor = reader.U32();
  message.tensor_count = reader.U32();
  message.remaining_ms = reader.U32();
  const uint32_t ranges = reader.U32();
  if (!reader.ok() || ranges > kMaxDigestRanges || ranges > reader.remaining() / sizeof(Span)) {
    return Malformed("DIGEST");
  }
  message.ranges.resize(ranges);
  for (Span &range : message.ranges) {
    range.offset = reader.U64();
    range.length = reader.U64();
  }
  if (!reader.Finished()) {
    return Malformed("DIGEST");
  }
  return message;
}

std::vector<uint8_t> Encode(const Digests &message) {
  Writer writer;
  Put(writer, message.status);
  writer.U32(static_cast<uint32_t>(message.values.size()));
  for (const uint32_t value : message.values) {
    writer.U32(value);
  }
  return writer.Take();
}

template <>
Result<Digests> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  const auto status = GetStatus(reader, {LLM_KV_CACHE_NOT_EXIST, LLM_PARAM_INVALID, LLM_TIMEOUT, LLM_FAILED});
  const uint32_t values = reader.U32();
  if (!status.has_value() || values > kMaxDigestRanges || values > reader.remaining() / sizeof(uint32_t)) {
    return Malformed("DIGESTS");
  }
  Digests message{*status, std::vector<uint32_t>(values)};
  for (uint32_t &value : message.values) {
    value = reader.U32();
  }
  if (!reader.Finished()) {
    return Malformed("DIGESTS");
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
