#include "base/text.h"
#include "channel/messages.h"
#include "channel/rank_fields.h"
#include "control/message_fields.h"

namespace datadist {

std::vector<uint8_t> Encode(const Declare &message) {
  Writer writer;
  Put(writer, message.key);
  Put(writer, message.rank);
  writer.U64(message.attempt);
  writer.Text(message.reason, kMaxText);
  return writer.Take();
}

template <>
Result<Declare> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  Declare message;
  Get(reader, message.key);
  const bool is_rank = Get(reader, message.rank);
  message.attempt = reader.U64();
  message.reason = OneLine(reader.Text(kMaxText));
  if (!reader.Finished() || !is_rank) {
    return Malformed("DECLARE");
  }
  return message;
}

std::vector<uint8_t> Encode(const Switch &message) {
  Writer writer;
  Put(writer, message.id);
  writer.U8(static_cast<uint8_t>(message.role));
  writer.U32(message.drain_ms);
  writer.U32(message.patience_ms);
  return writer.Take();
}

template <>
Result<Switch> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  Switch message;
  Get(reader, message.id);
  const uint8_t role = reader.U8();
  message.drain_ms = reader.U32();
  message.patience_ms = reader.U32();
  message.role = static_cast<InstanceRole>(role);
  const bool is_role = role > static_cast<uint8_t>(InstanceRole::kNone) && role < kInstanceRoles;
  if (!reader.Finished() || !is_role || message.drain_ms > kMaxDrainMs || message.patience_ms > kMaxPatienceMs) {
    return Malformed("SWITCH");
  }
  return message;
}

std::vector<uint8_t> Encode(const SwitchStatus &message) {
  Writer writer;
  writer.U8(static_cast<uint8_t>(message.state));
  writer.U8(static_cast<uint8_t>(message.role));
  writer.U32(message.leases);
  writer.U32(message.handoffs);
  writer.U32(message.taken);
  writer.U32(message.ranks);
  writer.Text(message.reason, kMaxText);
  return writer.Take();
}

template <>
Result<SwitchStatus> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  SwitchStatus message;
  const uint8_t state = reader.U8();
  const uint8_t role = reader.U8();
  message.leases = reader.U32();
  message.handoffs = reader.U32();
  message.taken = reader.U32();
  message.ranks = reader.U32();
  message.reason = OneLine(reader.Text(kMaxText));
  if (!reader.Finished() || state >= kSwitchStates || role >= kInstanceRoles) {
    return Malformed("SWITCHED");
  }
  message.state = static_cast<SwitchState>(state);
  message.role = static_cast<InstanceRole>(role);
  return message;
}

}  // namespace datadist
