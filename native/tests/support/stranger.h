// A peer that speaks the wire by hand, as somebody from elsewhere does.
#ifndef DATADIST_TESTS_SUPPORT_STRANGER_H_
#define DATADIST_TESTS_SUPPORT_STRANGER_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "base/random.h"
#include "base/socket_io.h"
#include "control/address.h"
#include "control/messages.h"
#include "support/eventually.h"
#include "support/frames.h"

namespace datadist::testing {

inline Deadline Soon() { return Deadline::In(kPatience); }

// All that this engine has, with so many streams of tcp.
inline std::vector<TransportOffer> OffersWith(uint16_t streams) {
  const auto low = static_cast<uint8_t>(streams);
  const auto high = static_cast<uint8_t>(streams >> 8);
  return {{"local", Blob(8, 0)}, {"cma", {}}, {"tcp", {low, high}}};
}

inline EndpointInfo InfoOf(uint64_t cluster_id) {
  EndpointInfo info;
  info.cluster_id = cluster_id;
  info.role = static_cast<int32_t>(llm_datadist::LlmRole::kMix);
  info.incarnation = RandomBytes().value();
  info.transports = OffersWith(1);
  return info;
}

class Stranger {
 public:
  explicit Stranger(const SocketAddress &address) : fd_(DialTcp(address, Soon()).value()) {}
  explicit Stranger(Fd accepted) : fd_(std::move(accepted)) {}

  void Say(MessageType type, const std::vector<uint8_t> &body, uint32_t seq = 1) {
    ASSERT_TRUE(SendFrame(fd_.get(), type, seq, body, Soon()).ok());
  }
  Frame Hear(MessageType expected) {
    const Result<Frame> frame = RecvFrame(fd_.get(), TypeSet(expected, MessageType::kReject), Soon());
    EXPECT_TRUE(frame.ok()) << frame.status().text();
    return frame.ok() ? frame.value() : Frame{};
  }
  Frame Greet(const EndpointInfo &info, bool force = false) {
    Hello hello;
    hello.versions = {kProtocolVersion, kProtocolVersion};
    hello.client = info;
    hello.remaining_ms = 60000;
    hello.force_link = force;
    Say(MessageType::kHello, Encode(hello));
    return Hear(MessageType::kWelcome);
  }
  // Whether the connection ends without another word, well before a handshake's five seconds are over.
  bool IsTurnedAway() {
    char byte = 0;
    return RecvAll(fd_.get(), &byte, 1, Deadline::In(std::chrono::seconds(3))).code() == llm_datadist::LLM_FAILED;
  }

 private:
  Fd fd_;
};

// A data connection of a link that is being made; none where the other end refuses it.
inline Fd AttachedStream(const SocketAddress &address, const Attach &attach) {
  Fd stream = std::move(DialTcp(address, Soon()).value());
  EXPECT_TRUE(SendFrame(stream.get(), MessageType::kAttach, 1, Encode(attach), Soon()).ok());
  return RecvFrame(stream.get(), TypeSet(MessageType::kAttached), Soon()).ok() ? std::move(stream) : Fd();
}

}  // namespace datadist::testing

#endif  // DATADIST_TESTS_SUPPORT_STRANGER_H_
