// What the fuzz targets share. A target is a file NAME_fuzz.cc with LLVMFuzzerTestOneInput: a decoder of bytes from
// outside, and what must hold of whatever it lets through. libFuzzer runs it where the compiler has one, else
// standalone_main.cc does.
#ifndef DATADIST_FUZZ_FUZZ_H_
#define DATADIST_FUZZ_FUZZ_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "base/bytes.h"

namespace datadist::fuzz {

using Bytes = std::vector<uint8_t>;

// Ends the process, so that the driver keeps the input.
#define FUZZ_CHECK(condition)                                                                  \
  do {                                                                                         \
    if (!(condition)) {                                                                        \
      std::fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition);      \
      std::abort();                                                                            \
    }                                                                                          \
  } while (false)

// The parts of an input in order; past its end zeros and empty parts.
class Input {
 public:
  Input(const uint8_t *data, size_t size) : reader_(data, size) {}

  uint8_t U8() { return reader_.U8(); }
  uint32_t U32() { return reader_.U32(); }
  // Memory of exactly that size: a read past its end is seen.
  Bytes Take(size_t size) {
    Bytes bytes(std::min(size, reader_.remaining()));
    if (!bytes.empty()) {
      reader_.Bytes(bytes.data(), bytes.size());
    }
    return bytes;
  }
  Bytes Rest() { return Take(reader_.remaining()); }
  std::string RestAsText() {
    const Bytes rest = Rest();
    return std::string(rest.begin(), rest.end());
  }

 private:
  Reader reader_;
};

}  // namespace datadist::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
// Changes the bytes in place and returns their new size, as libFuzzer does it.
extern "C" size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);

#endif  // DATADIST_FUZZ_FUZZ_H_
