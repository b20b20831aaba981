// A decoder with the oldest of defects: a length that it believes. The test of the driver: it must find this.
#include <cstring>

#include "fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  datadist::fuzz::Input input(data, size);
  const uint8_t kind = input.U8();
  const uint32_t length = input.U32();
  const datadist::fuzz::Bytes body = input.Rest();
  if (kind == 7 && length < 4096 && !body.empty()) {
    datadist::fuzz::Bytes out(length);
    if (!out.empty()) {
      std::memcpy(out.data(), body.data(), out.size());
    }
  }
  return 0;
}
