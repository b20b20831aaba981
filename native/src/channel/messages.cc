#include "channel/messages.h"

#include <algorithm>
#include <utility>

#include "base/text.h"
#include "channel/rank_fields.h"
#include "control/message_fields.h"

namespace datadist {
namespace {

// Writes at most as many as a message may have: its sender sees to it that there are no more.
void Put(Writer &writer, const std::vector<LeaseToken> &tokens) {
  const size_t count = std::min(tokens.size(), kMaxLeasesPerMessage);
  writer.Reserve(sizeof(uint32_t) + count * sizeof(LeaseToken) + 1);
  writer.U32(static_cast<uint32_t>(count));
  for (size_t i = 0; i < count; ++i) {
    Put(writer, tokens[i]);
  }
}

// False unless as many follow as were announced, and `rest` bytes.
bool Get(Reader &reader, std::vector<LeaseToken> &tokens, size_t rest) {
  const uint32_t count = reader.U32();
  if (!reader.ok() || count > kMaxLeasesPerMessage || reader.remaining() != count * sizeof(LeaseToken) + rest) {
    return false;
  }
  tokens.resize(count);
  for (LeaseToken &token : tokens) {
    Get(reader, token);
  }
  return true;
}

std::vector<uint8_t> EncodeTokens(const std::vector<LeaseToken> &tokens) {
  Writer writer;
  Put(writer, tokens);
  return writer.Take();
}

Result<std::vector<LeaseToken>> DecodeTokens(const std::vector<uint8_t> &body, const char *message) {
  Reader reader(body.data(), body.size());
  std::vector<LeaseToken> tokens;
  return Get(reader, tokens, 0) ? Result<std::vector<LeaseToken>>(std::move(tokens)) : Malformed(message);
}

void Put(Writer &writer, const LeaseContent &content) {
  Put(writer, content.prompt);
  Put(writer, content.blocks);
}

void Get(Reader &reader, LeaseContent &content) {
  Get(reader, content.prompt);
  Get(reader, content.blocks);
}

void Put(Writer &writer, const ProgressMark &mark) {
  const size_t size = std::min(mark.layers.size(), kMaxLayerBytes);
  writer.U32(mark.epoch);
  writer.U32(mark.base);
  writer.U32(mark.next);
  writer.U16(static_cast<uint16_t>(size));
  writer.Bytes(mark.layers.data(), size);
}

// False for one that goes backwards or has too many layers, before there is memory for them.
bool Get(Reader &reader, ProgressMark &mark) {
  mark.epoch = reader.U32();
  mark.base = reader.U32();
  mark.next = reader.U32();
  const uint16_t size = reader.U16();
  if (!reader.ok() || mark.base > mark.next || size > std::min(kMaxLayerBytes, reader.remaining())) {
    return false;
  }
  mark.layers.resize(size);
  reader.Bytes(mark.layers.data(), size);
  return true;
}

void Put(Writer &writer, const Delivery &delivery) {
  writer.U8(static_cast<uint8_t>(delivery.state));
  writer.U32(delivery.epoch);
  writer.U64(delivery.bytes);
  writer.U64(delivery.early_bytes);
  writer.U64(delivery.run_us);
  writer.Text(delivery.reason, kMaxText);
}

bool Get(Reader &reader, Delivery &delivery) {
  const uint8_t state = reader.U8();
  delivery.epoch = reader.U32();
  delivery.bytes = reader.U64();
  delivery.early_bytes = reader.U64();
  delivery.run_us = reader.U64();
  delivery.reason = OneLine(reader.Text(kMaxText));
  delivery.state = state < kDeliveryStates ? static_cast<DeliveryState>(state) : DeliveryState::kNone;
  return reader.ok() && state < kDeliveryStates;
}

// At the end of a body.
void PutBlob(Writer &writer, const std::vector<uint8_t> &blob) {
  writer.U32(static_cast<uint32_t>(blob.size()));
  writer.Bytes(blob.data(), blob.size());
}

// False unless as many bytes follow as were announced, and no more than allowed.
bool GetBlob(Reader &reader, std::vector<uint8_t> &blob) {
  const uint32_t size = reader.U32();
  if (!reader.ok() || size > kMaxOffer || size != reader.remaining()) {
    return false;
  }
  blob.resize(size);
  reader.Bytes(blob.data(), size);
  return true;
}

}  // namespace

// As in HELLO the versions stand first, where a peer of any version finds them.
std::vector<uint8_t> Encode(const ChannelGreeting &message) {
  Writer writer;
  writer.U16(message.versions.lowest);
  writer.U16(message.versions.highest);
  writer.U16(message.content_version);
  return writer.Take();
}

template <>
Result<ChannelGreeting> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  ChannelGreeting message;
  message.versions.lowest = reader.U16();
  message.versions.highest = reader.U16();
  message.content_version = reader.U16();
  if (!reader.Finished()) {
    return Malformed("CHANNEL");
  }
  return message;
}

std::vector<uint8_t> Encode(const DescribeRank &message) {
  Writer writer;
  writer.Text(message.engine_id, kMaxEngineId);
  Put(writer, message.incarnation);
  Put(writer, message.rank);
  writer.U64(message.asker);
  return writer.Take();
}

template <>
Result<DescribeRank> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  DescribeRank message;
  message.engine_id = reader.Text(kMaxEngineId);
  Get(reader, message.incarnation);
  const bool is_rank = Get(reader, message.rank);
  message.asker = reader.U64();
  if (!reader.Finished() || !is_rank) {
    return Malformed("DESCRIBE_RANK");
  }
  return message;
}

std::vector<uint8_t> Encode(const RankAnswer &message) {
  Writer writer;
  writer.Reserve(kMaxText + message.geometry.size() + 16);
  Put(writer, message.status);
  writer.U32(static_cast<uint32_t>(message.geometry.size()));
  writer.Bytes(message.geometry.data(), message.geometry.size());
  return writer.Take();
}

template <>
Result<RankAnswer> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  const auto status = GetStatus(reader, {llm_datadist::LLM_PARAM_INVALID, llm_datadist::LLM_NOT_YET_LINK});
  const uint32_t size = reader.U32();
  if (!status.has_value() || !reader.ok() || size != reader.remaining() || (!status->ok() && size > 0)) {
    return Malformed("RANK");
  }
  RankAnswer message{*status, std::vector<uint8_t>(size)};
  reader.Bytes(message.geometry.data(), size);
  return message;
}

std::vector<uint8_t> Encode(const Renew &message) {
  Writer writer;
  Put(writer, message.tokens);
  writer.U8(message.pulling ? 1 : 0);
  return writer.Take();
}

std::vector<uint8_t> Encode(const Renewed &message) { return EncodeTokens(message.gone); }
std::vector<uint8_t> Encode(const Release &message) { return EncodeTokens(message.tokens); }

template <>
Result<Renew> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  Renew message;
  if (!Get(reader, message.tokens, sizeof(uint8_t))) {
    return Malformed("RENEW");
  }
  const uint8_t pulling = reader.U8();
  if (pulling > 1) {
    return Malformed("RENEW");
  }
  message.pulling = pulling == 1;
  return message;
}

template <>
Result<Renewed> Decode(const std::vector<uint8_t> &body) {
  Result<std::vector<LeaseToken>> tokens = DecodeTokens(body, "RENEWED");
  return tokens.ok() ? Result<Renewed>(Renewed{std::move(tokens).value()}) : tokens.status();
}

template <>
Result<Release> Decode(const std::vector<uint8_t> &body) {
  Result<std::vector<LeaseToken>> tokens = DecodeTokens(body, "RELEASE");
  return tokens.ok() ? Result<Release>(Release{std::move(tokens).value()}) : tokens.status();
}

std::vector<uint8_t> Encode(const Confirm &message) {
  Writer writer;
  Put(writer, message.token);
  writer.U64(message.generation);
  Put(writer, message.content);
  return writer.Take();
}

template <>
Result<Confirm> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  Confirm message;
  Get(reader, message.token);
  message.generation = reader.U64();
  Get(reader, message.content);
  if (!reader.Finished()) {
    return Malformed("CONFIRM");
  }
  return message;
}

std::vector<uint8_t> Encode(const Confirmed &message) {
  Writer writer;
  writer.U8(static_cast<uint8_t>(message.verdict));
  return writer.Take();
}

template <>
Result<Confirmed> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  const uint8_t verdict = reader.U8();
  if (!reader.Finished() || verdict >= kLeaseVerdicts) {
    return Malformed("CONFIRMED");
  }
  return Confirmed{static_cast<LeaseVerdict>(verdict)};
}

std::vector<uint8_t> Encode(const Await &message) {
  Writer writer;
  Put(writer, message.token);
  writer.U8(message.rank.has_value() ? 1 : 0);
  if (message.rank.has_value()) {
    Put(writer, *message.rank);
  }
  writer.U32(message.seen_version);
  writer.U64(message.seen_stamp);
  writer.U32(message.patience_ms);
  writer.U64(message.offer_id);
  return writer.Take();
}

template <>
Result<Await> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  Await message;
  Get(reader, message.token);
  const uint8_t has_rank = reader.U8();
  bool is_rank = has_rank <= 1;
  if (has_rank == 1) {
    is_rank = Get(reader, message.rank.emplace());
  }
  message.seen_version = reader.U32();
  message.seen_stamp = reader.U64();
  message.patience_ms = reader.U32();
  message.offer_id = reader.U64();
  if (!reader.Finished() || !is_rank || message.patience_ms > kMaxPatienceMs) {
    return Malformed("AWAIT");
  }
  return message;
}

std::vector<uint8_t> Encode(const HandoffNews &message) {
  Writer writer;
  writer.Reserve(4096 + (message.blob.has_value() ? message.blob->size() : 0));
  writer.U8(static_cast<uint8_t>(message.state));
  writer.U32(message.epoch);
  writer.U32(message.version);
  writer.U64(message.stamp);
  Put(writer, message.mark);
  Put(writer, message.delivery);
  writer.Text(message.reason, kMaxText);
  writer.U8(message.blob.has_value() ? 1 : 0);
  if (message.blob.has_value()) {
    writer.U32(static_cast<uint32_t>(message.blob->size()));
    writer.Bytes(message.blob->data(), message.blob->size());
  }
  return writer.Take();
}

template <>
Result<HandoffNews> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  HandoffNews message;
  const uint8_t state = reader.U8();
  message.epoch = reader.U32();
  message.version = reader.U32();
  message.stamp = reader.U64();
  const bool is_mark = Get(reader, message.mark) && Get(reader, message.delivery);
  message.reason = OneLine(reader.Text(kMaxText));
  const uint8_t has_blob = reader.U8();
  const uint32_t size = has_blob == 1 ? reader.U32() : 0;
  if (!reader.ok() || state >= kHandoffStates || !is_mark || has_blob > 1 || size != reader.remaining()) {
    return Malformed("HANDOFF");
  }
  message.state = static_cast<HandoffState>(state);
  if (has_blob == 1) {
    message.blob.emplace(size);
    reader.Bytes(message.blob->data(), size);
  }
  return message;
}

// Writes at most as many as a message may have: its sender sees to it that there are no more.
std::vector<uint8_t> Encode(const ReportProgress &message) {
  const size_t count = std::min(message.marks.size(), kMaxMarksPerReport);
  Writer writer;
  Put(writer, message.key);
  Put(writer, message.rank);
  writer.U32(static_cast<uint32_t>(count));
  for (size_t i = 0; i < count; ++i) {
    Put(writer, message.marks[i].first);
    Put(writer, message.marks[i].second);
  }
  return writer.Take();
}

template <>
Result<ReportProgress> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  ReportProgress message;
  Get(reader, message.key);
  const bool is_rank = Get(reader, message.rank);
  const uint32_t count = reader.U32();
  bool are_marks = is_rank && count <= kMaxMarksPerReport;
  for (uint32_t i = 0; are_marks && i < count; ++i) {
    auto &[token, mark] = message.marks.emplace_back();
    Get(reader, token);
    are_marks = Get(reader, mark);
  }
  if (!reader.Finished() || !are_marks) {
    return Malformed("REPORT");
  }
  return message;
}

std::vector<uint8_t> Encode(const Offer &message) {
  Writer writer;
  writer.Reserve(64 + message.blob.size());
  Put(writer, message.token);
  Put(writer, message.rank);
  writer.U64(message.offer_id);
  PutBlob(writer, message.blob);
  return writer.Take();
}

template <>
Result<Offer> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  Offer message;
  Get(reader, message.token);
  const bool is_rank = Get(reader, message.rank);
  message.offer_id = reader.U64();
  if (!is_rank || message.offer_id == 0 || !GetBlob(reader, message.blob)) {
    return Malformed("OFFER");
  }
  return message;
}

std::vector<uint8_t> Encode(const Offered &message) {
  Writer writer;
  Put(writer, message.status);
  return writer.Take();
}

template <>
Result<Offered> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  const auto status = GetStatus(reader, {llm_datadist::LLM_PARAM_INVALID});
  if (!status.has_value() || !reader.Finished()) {
    return Malformed("OFFERED");
  }
  return Offered{*status};
}

std::vector<uint8_t> Encode(const Watch &message) {
  Writer writer;
  Put(writer, message.key);
  Put(writer, message.rank);
  writer.U64(message.seen);
  writer.U32(message.patience_ms);
  return writer.Take();
}

template <>
Result<Watch> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  Watch message;
  Get(reader, message.key);
  const bool is_rank = Get(reader, message.rank);
  message.seen = reader.U64();
  message.patience_ms = reader.U32();
  if (!reader.Finished() || !is_rank || message.patience_ms > kMaxPatienceMs) {
    return Malformed("WATCH");
  }
  return message;
}

std::vector<uint8_t> Encode(const Watched &message) {
  Writer writer;
  writer.Reserve(64 + message.blob.size());
  writer.U64(message.number);
  writer.U8(message.role.has_value() ? 1 : 0);
  if (message.role.has_value()) {
    writer.U64(message.role->attempt);
    writer.U8(static_cast<uint8_t>(message.role->role));
    writer.U32(message.role->limit_ms);
    return writer.Take();
  }
  Put(writer, message.token);
  writer.U64(message.offer_id);
  PutBlob(writer, message.blob);
  return writer.Take();
}

template <>
Result<Watched> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  Watched message;
  message.number = reader.U64();
  const uint8_t is_role = reader.U8();
  if (is_role == 1) {
    RoleOrder &order = message.role.emplace();
    order.attempt = reader.U64();
    const uint8_t role = reader.U8();
    order.limit_ms = reader.U32();
    order.role = static_cast<InstanceRole>(role);
    return reader.Finished() && role >= 1 && role < kInstanceRoles ? Result<Watched>(message) : Malformed("WATCHED");
  }
  Get(reader, message.token);
  message.offer_id = reader.U64();
  if (is_role != 0 || !GetBlob(reader, message.blob)) {
    return Malformed("WATCHED");
  }
  return message;
}

std::vector<uint8_t> Encode(const Deliver &message) {
  Writer writer;
  Put(writer, message.key);
  Put(writer, message.rank);
  Put(writer, message.token);
  writer.U64(message.offer_id);
  Put(writer, message.delivery);
  return writer.Take();
}

template <>
Result<Deliver> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  Deliver message;
  Get(reader, message.key);
  const bool is_rank = Get(reader, message.rank);
  Get(reader, message.token);
  message.offer_id = reader.U64();
  const bool is_delivery = Get(reader, message.delivery);
  if (!reader.Finished() || !is_rank || !is_delivery) {
    return Malformed("DELIVER");
  }
  return message;
}

}  // namespace datadist
