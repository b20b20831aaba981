// Opening a connection by key: input = which step, body. Whatever comes from who does not know the key opens nothing.
#include "base/hmac.h"
#include "control/opening.h"
#include "fuzz/fuzz.h"

namespace datadist::fuzz {
namespace {

enum Step : uint8_t { kOpen, kProve, kOpened };
constexpr size_t kCountOffset = 20;  // of the number of keys in OPEN

std::vector<Key> OurKeys() {
  Key first;
  first.id.fill(1);
  first.secret.fill(0xA1);
  Key second;
  second.id.fill(2);
  second.secret.fill(0xB2);
  return {first, second};
}

void Serve(const Bytes &open, const Bytes &proof) {
  ServerOpening server(OurKeys());
  const Result<Bytes> opened = server.OnOpen(open);
  FUZZ_CHECK(!opened.ok() || opened.value().size() == sizeof(KeyId) + 16 + sizeof(Digest));
  FUZZ_CHECK(!opened.ok() || open.at(kCountOffset) <= kMaxKeys);
  FUZZ_CHECK(!server.OnProve(proof).ok());
}

void Ask(const Bytes &opened) {
  ClientOpening client(OurKeys());
  FUZZ_CHECK(client.Open().ok());
  FUZZ_CHECK(!client.OnOpened(opened).ok());
}

}  // namespace
}  // namespace datadist::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  using namespace datadist;        // NOLINT(google-build-using-namespace): this file's own
  using namespace datadist::fuzz;  // NOLINT(google-build-using-namespace): this file's own
  static const bool loaded = LoadHmac().ok();
  FUZZ_CHECK(loaded);
  Input input(data, size);
  switch (input.U8()) {
    case kOpen:
      Serve(input.Rest(), Bytes(sizeof(Digest)));
      break;
    case kProve:
      Serve(ClientOpening(OurKeys()).Open().value(), input.Rest());
      break;
    case kOpened:
      Ask(input.Rest());
      break;
    default:
      break;
  }
  return 0;
}
