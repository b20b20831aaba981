// A peer with an established link over tcp, every byte of which the test says.
#ifndef DATADIST_TESTS_SUPPORT_HANDMADE_LINK_H_
#define DATADIST_TESTS_SUPPORT_HANDMADE_LINK_H_

#include "support/stranger.h"

namespace datadist::testing {

// A link over tcp, one data connection each way.
struct HandmadeLink {
  HandmadeLink(const SocketAddress &address, uint64_t id) : control(address) {
    EndpointInfo info = InfoOf(id);
    info.transports = OffersWith(1);
    const Result<Welcome> welcome = Decode<Welcome>(control.Greet(info).body);
    EXPECT_TRUE(welcome.ok());
    control.Say(MessageType::kReady, Encode(Ready{"tcp", ""}), 2);
    control.Hear(MessageType::kReady);
    served = AttachedStream(address, Attach{welcome.value().token, Initiator::kClient, 0});
    other = AttachedStream(address, Attach{welcome.value().token, Initiator::kServer, 0});
    control.Say(MessageType::kEstablished, {}, 3);
  }
  Stranger control;
  Fd served;
  Fd other;
};

}  // namespace datadist::testing

#endif  // DATADIST_TESTS_SUPPORT_HANDMADE_LINK_H_
