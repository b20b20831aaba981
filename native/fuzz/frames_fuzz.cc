// A stream of frames as it comes from a socket: input = how it is cut into reads, whether it has seals, bytes.
#include <algorithm>
#include <cstring>

#include "base/crc32c.h"
#include "base/hmac.h"
#include "control/frame.h"
#include "fuzz/fuzz.h"

namespace datadist::fuzz {
namespace {

constexpr size_t kPrefix = 5;  // of the input: u32 for the cuts, u8 for the seals
constexpr size_t kLengthOffset = 8;
constexpr size_t kCrcOffset = 16;

TypeSet AllTypes() {
  TypeSet all;
  for (uint16_t type = 1; type < 32; ++type) {
    all.Add(static_cast<MessageType>(type));
  }
  return all;
}

FrameSeal Seal(bool sealed) {
  Digest key;
  key.fill(0x5E);
  return sealed ? FrameSeal(key) : FrameSeal();
}

// Nothing is waited for that is longer than its type allows.
void CheckHeader(const uint8_t *header) {
  Reader reader(header, kFrameHeaderSize);
  reader.U32();
  reader.U16();
  const auto type = static_cast<MessageType>(reader.U16());
  FUZZ_CHECK(reader.U32() <= BodyCap(type));
}

// What came out is what went in: encoded again, a frame is the bytes that it was read from.
void Check(const Frame &frame, const uint8_t *first, size_t size, FrameSeal &seal) {
  FUZZ_CHECK(frame.body.size() <= BodyCap(frame.type));
  const Bytes again = EncodeFrame(frame.type, frame.seq, frame.body, &seal);
  FUZZ_CHECK(again.size() == size);
  const bool same_version = std::equal(again.begin() + 4, again.begin() + 6, first + 4);
  FUZZ_CHECK(!same_version || std::equal(again.begin(), again.end(), first));
}

void ReadAll(const Bytes &stream, uint32_t cuts, bool sealed) {
  FrameReader reader(Seal(sealed));
  FrameSeal expected = Seal(sealed);
  size_t at = 0;
  size_t frame_at = 0;
  while (true) {
    FUZZ_CHECK(reader.wanted() > 0);
    // An announced length alone costs nothing.
    FUZZ_CHECK(reader.wanted() <= std::max(kFirstBodyBytes, at - frame_at));
    cuts = cuts * 1664525U + 1013904223U;
    const size_t cut = cuts >> 31 == 0 ? 1 + (cuts >> 20) % 64 : stream.size();
    const size_t size = std::min({reader.wanted(), stream.size() - at, cut});
    if (size == 0) {
      return;
    }
    std::copy_n(stream.begin() + static_cast<std::ptrdiff_t>(at), size, reader.next());
    at += size;
    const Result<std::optional<Frame>> frame = reader.Filled(size, AllTypes());
    if (!frame.ok()) {
      return;
    }
    if (at - frame_at == kFrameHeaderSize) {
      CheckHeader(stream.data() + frame_at);
    }
    if (frame.value().has_value()) {
      FUZZ_CHECK(reader.AtBoundary());
      Check(*frame.value(), stream.data() + frame_at, at - frame_at, expected);
      frame_at = at;
    }
  }
}

void Store(uint8_t *at, uint32_t value) {
  for (size_t i = 0; i < sizeof(value); ++i) {
    at[i] = static_cast<uint8_t>(value >> (8 * i));
  }
}

uint32_t Load(const uint8_t *at) { return Reader(at, sizeof(uint32_t)).U32(); }

// Gives the frames of a stream their checksums and seals; the last one, which may be cut, its length too.
void Repair(uint8_t *data, size_t size, bool sealed) {
  FrameSeal seal = Seal(sealed);
  while (size >= kFrameHeaderSize + seal.size()) {
    const size_t most = size - kFrameHeaderSize - seal.size();
    const size_t body_size = std::min<size_t>(Load(data + kLengthOffset), most);
    Writer magic;
    magic.U32(kFrameMagic);
    std::copy_n(magic.data(), magic.size(), data);
    Store(data + kLengthOffset, static_cast<uint32_t>(body_size));
    Store(data + kCrcOffset, 0);
    const uint8_t *const body = data + kFrameHeaderSize;
    Store(data + kCrcOffset, Crc32c(body, body_size, Crc32c(data, kFrameHeaderSize)));
    if (sealed) {
      const auto bytes = seal.Next(data, Bytes(body, body + body_size));
      std::copy(bytes.begin(), bytes.end(), data + kFrameHeaderSize + body_size);
    }
    const size_t frame_size = kFrameHeaderSize + body_size + seal.size();
    data += frame_size;
    size -= frame_size;
  }
}

}  // namespace
}  // namespace datadist::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  using namespace datadist;        // NOLINT(google-build-using-namespace): this file's own
  using namespace datadist::fuzz;  // NOLINT(google-build-using-namespace): this file's own
  static const bool loaded = LoadHmac().ok();
  FUZZ_CHECK(loaded);
  Input input(data, size);
  const uint32_t cuts = input.U32();
  const bool sealed = input.U8() % 2 != 0;
  ReadAll(input.Rest(), cuts, sealed);
  return 0;
}

// A checksum is no obstacle to who means harm: most changed streams get right ones.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned int seed) {
  using namespace datadist::fuzz;  // NOLINT(google-build-using-namespace): this file's own
  const size_t changed = LLVMFuzzerMutate(data, size, max_size);
  if (seed % 4 != 0 && changed > kPrefix) {
    Repair(data + kPrefix, changed - kPrefix, data[kPrefix - 1] % 2 != 0);
  }
  return changed;
}
