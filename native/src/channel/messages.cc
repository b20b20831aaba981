#include "channel/messages.h"

#include <algorithm>
#include <utility>

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

}  // namespace datadist
