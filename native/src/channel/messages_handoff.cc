// What the frames of hand-offs say: AWAIT, HANDOFF, OFFER, and what P's own ranks ask and report.
#include <algorithm>
#include <utility>

#include "base/text.h"
#include "channel/messages.h"
#include "channel/rank_fields.h"
#include "control/message_fields.h"

namespace datadist {
namespace {

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
