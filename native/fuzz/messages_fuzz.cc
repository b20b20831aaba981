// The messages of the control connection: input = number of the message in kMessages, body.
#include <iterator>

#include "channel/messages.h"
#include "control/messages.h"
#include "fuzz/fuzz.h"

namespace datadist::fuzz {
namespace {

// A body says one thing in one way, or two ends could understand it differently.
template <typename Message>
void Exact(const Bytes &body) {
  const Result<Message> message = Decode<Message>(body);
  FUZZ_CHECK(!message.ok() || Encode(message.value()) == body);
}

// Texts are made fit for people when they are read, which must change nothing a second time.
template <typename Message>
void WithText(const Bytes &body) {
  const Result<Message> message = Decode<Message>(body);
  if (message.ok()) {
    const Bytes encoded = Encode(message.value());
    FUZZ_CHECK(encoded.size() <= body.size());
    FUZZ_CHECK(Decode<Message>(encoded).ok());
    Exact<Message>(encoded);
  }
}

void Range(const Bytes &body) {
  const Result<VersionRange> range = DecodeVersionRange(body);
  FUZZ_CHECK(!range.ok() || range.value().lowest <= range.value().highest);
}

void Empty(const Bytes &body) { FUZZ_CHECK(DecodeEmpty(body).ok() == body.empty()); }

// A new message is a line here and one in seeds.cc, both at the end: inputs that were kept name theirs by number.
constexpr void (*kMessages[])(const Bytes &) = {
    Exact<Hello>,           Exact<Welcome>,      WithText<Reject>,     WithText<Ready>,    Exact<Attach>,
    Exact<DescribeRequest>, WithText<CacheInfo>, Exact<PushRequest>,   WithText<Pushed>,   Exact<ConsumeRequest>,
    WithText<Consumed>,     Exact<UnlinkRequest>, Range,               Empty,
    Exact<DigestRequest>,   WithText<Digests>,   Exact<ChannelGreeting>, Exact<DescribeRank>, WithText<RankAnswer>,
    Exact<Renew>,           Exact<Renewed>,      Exact<Confirm>,       Exact<Confirmed>,   Exact<Release>,
    Exact<Await>,           WithText<HandoffNews>, Exact<ReportProgress>,
    Exact<Offer>,           WithText<Offered>,   Exact<Watch>,         Exact<Watched>,    WithText<Deliver>,
    WithText<Declare>,      Exact<Switch>,       WithText<SwitchStatus>,
};

}  // namespace
}  // namespace datadist::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  using namespace datadist::fuzz;  // NOLINT(google-build-using-namespace): this file's own
  Input input(data, size);
  const size_t number = input.U8();
  if (number < std::size(kMessages)) {
    kMessages[number](input.Rest());
  }
  return 0;
}
