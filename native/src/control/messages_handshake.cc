// The messages that make a link.
#include <algorithm>
#include <utility>

#include "control/frame.h"
#include "control/message_fields.h"
#include "control/messages.h"

namespace datadist {
namespace {

constexpr size_t kMaxCommName = 127;

bool IsTransportName(const std::string &name) {
  return !name.empty() && name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_") == std::string::npos;
}

void Put(Writer &writer, const std::vector<TransportOffer> &offers) {
  writer.U8(static_cast<uint8_t>(offers.size()));
  for (const TransportOffer &offer : offers) {
    writer.Text(offer.name, kMaxTransportName);
    writer.U16(static_cast<uint16_t>(offer.blob.size()));
    writer.Bytes(offer.blob.data(), offer.blob.size());
  }
}

bool Get(Reader &reader, std::vector<TransportOffer> &offers) {
  const uint8_t count = reader.U8();
  if (count > kMaxTransports) {
    return false;
  }
  for (uint8_t i = 0; i < count; ++i) {
    TransportOffer offer;
    offer.name = reader.Text(kMaxTransportName);
    const uint16_t size = reader.U16();
    const bool again = std::any_of(offers.begin(), offers.end(),
                                   [&](const TransportOffer &other) { return other.name == offer.name; });
    if (!IsTransportName(offer.name) || again || size > kMaxOfferBlob) {
      return false;
    }
    offer.blob.resize(size);
    reader.Bytes(offer.blob.data(), size);
    offers.push_back(std::move(offer));
  }
  return reader.ok();
}

void Put(Writer &writer, const EndpointInfo &info) {
  writer.U64(info.cluster_id);
  writer.I32(info.role);
  Put(writer, info.incarnation);
  writer.U8(info.remote_accessible ? 1 : 0);
  Put(writer, info.transports);
}

bool Get(Reader &reader, EndpointInfo &info) {
  info.cluster_id = reader.U64();
  info.role = reader.I32();
  Get(reader, info.incarnation);
  const uint8_t accessible = reader.U8();
  info.remote_accessible = accessible == 1;
  return Get(reader, info.transports) && accessible <= 1 && info.role >= 1 && info.role <= 3;
}

}  // namespace

std::vector<uint8_t> Encode(const Hello &message) {
  Writer writer;
  writer.U16(message.versions.lowest);
  writer.U16(message.versions.highest);
  Put(writer, message.client);
  writer.U32(message.remaining_ms);
  writer.U8(message.force_link ? 1 : 0);
  Put(writer, message.replaced);
  writer.Text(message.comm_name, kMaxCommName);
  writer.I64(message.comm_id);
  return writer.Take();
}

Result<VersionRange> DecodeVersionRange(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  VersionRange range;
  range.lowest = reader.U16();
  range.highest = reader.U16();
  if (!reader.ok() || range.lowest > range.highest) {
    return Malformed("version range");
  }
  return range;
}

Status CheckVersions(const VersionRange &client) {
  if (client.lowest <= kProtocolVersion && client.highest >= kProtocolVersion) {
    return Status::Ok();
  }
  return Status(llm_datadist::LLM_LINK_FAILED,
                "protocol versions differ: client " + std::to_string(client.lowest) + ".." +
                    std::to_string(client.highest) + ", server " + std::to_string(kProtocolVersion) + ".." +
                    std::to_string(kProtocolVersion));
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
  Get(reader, message.replaced);
  message.comm_name = reader.Text(kMaxCommName);
  message.comm_id = reader.I64();
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
  const auto status = GetStatus(
      reader, {llm_datadist::LLM_ALREADY_LINK, llm_datadist::LLM_PROCESSING_LINK, llm_datadist::LLM_NOT_YET_LINK,
               llm_datadist::LLM_LINK_FAILED, llm_datadist::LLM_PARAM_INVALID, llm_datadist::LLM_FAILED});
  if (!status.has_value() || status->ok() || !reader.Finished()) {
    return Malformed("REJECT");
  }
  return Reject{*status};
}

std::vector<uint8_t> Encode(const Ready &message) {
  Writer writer;
  writer.Text(message.transport, kMaxTransportName);
  writer.Text(message.reason, kMaxText);
  return writer.Take();
}

template <>
Result<Ready> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  Ready message;
  message.transport = reader.Text(kMaxTransportName);
  message.reason = OneLine(reader.Text(kMaxText));
  if (!reader.Finished() || !IsTransportName(message.transport)) {
    return Malformed("READY");
  }
  return message;
}

std::vector<uint8_t> Encode(const Attach &message) {
  Writer writer;
  Put(writer, message.token);
  writer.U8(static_cast<uint8_t>(message.initiator));
  writer.U16(message.index);
  Put(writer, message.proof);
  return writer.Take();
}

template <>
Result<Attach> Decode(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  Attach message;
  Get(reader, message.token);
  const uint8_t initiator = reader.U8();
  message.index = reader.U16();
  Get(reader, message.proof);
  const bool known = initiator == static_cast<uint8_t>(Initiator::kClient) ||
                     initiator == static_cast<uint8_t>(Initiator::kServer);
  if (!reader.Finished() || message.index >= kMaxDataConnections || !known) {
    return Malformed("ATTACH");
  }
  message.initiator = static_cast<Initiator>(initiator);
  return message;
}

}  // namespace datadist
