#include "fuzz/mutate.h"

#include <algorithm>
#include <iterator>

namespace datadist::fuzz {
namespace {

using Bytes = std::vector<uint8_t>;

size_t Below(size_t limit, Random &random) { return limit == 0 ? 0 : random() % limit; }
Bytes::iterator At(Bytes &bytes, size_t at) { return bytes.begin() + static_cast<std::ptrdiff_t>(at); }

// Where counts and offsets go wrong: the ends of the widths, and what is one away from them.
uint64_t NumberOfNote(Random &random) {
  const uint64_t power = uint64_t{1} << Below(64, random);
  const uint64_t numbers[] = {0, 1, power, power - 1, power + 1, ~uint64_t{0}, ~power, random() % 256};
  return numbers[Below(std::size(numbers), random)];
}

void StoreNumber(Bytes &bytes, Random &random) {
  const size_t width = std::min<size_t>(size_t{1} << Below(4, random), bytes.size());
  const size_t at = Below(bytes.size() - width + 1, random);
  const uint64_t number = NumberOfNote(random);
  for (size_t i = 0; i < width; ++i) {
    bytes[at + i] = static_cast<uint8_t>(number >> (8 * i));
  }
}

void PutIn(Bytes &bytes, const Bytes &more, size_t max_size, Random &random) {
  const size_t size = std::min(more.size(), max_size - std::min(max_size, bytes.size()));
  bytes.insert(At(bytes, Below(bytes.size() + 1, random)), more.begin(),
               more.begin() + static_cast<std::ptrdiff_t>(size));
}

Bytes PartOf(const Bytes &bytes, Random &random) {
  const size_t first = Below(bytes.size(), random);
  const size_t size = std::min<size_t>(1 + Below(bytes.size() - first, random), bytes.size() - first);
  const auto begin = bytes.begin() + static_cast<std::ptrdiff_t>(first);
  return Bytes(begin, begin + static_cast<std::ptrdiff_t>(size));
}

}  // namespace

void MutateOnce(Bytes &bytes, size_t max_size, Random &random) {
  if (bytes.empty()) {
    PutIn(bytes, Bytes(1 + Below(8, random), static_cast<uint8_t>(random())), max_size, random);
    return;
  }
  switch (Below(7, random)) {
    case 0: {
      uint8_t &byte = bytes[Below(bytes.size(), random)];
      byte = static_cast<uint8_t>(byte ^ (1U << Below(8, random)));
      break;
    }
    case 1:
      bytes[Below(bytes.size(), random)] = static_cast<uint8_t>(random());
      break;
    case 2:
    case 3:
      StoreNumber(bytes, random);
      break;
    case 4:
      PutIn(bytes, Bytes(1 + Below(16, random), static_cast<uint8_t>(random())), max_size, random);
      break;
    case 5: {
      const size_t first = Below(bytes.size(), random);
      const size_t size = 1 + Below(std::min<size_t>(bytes.size() - first, 32), random);
      bytes.erase(At(bytes, first), At(bytes, std::min(first + size, bytes.size())));
      break;
    }
    default:
      PutIn(bytes, PartOf(bytes, random), max_size, random);
      break;
  }
}

void Splice(Bytes &bytes, const Bytes &other, size_t max_size, Random &random) {
  if (other.empty()) {
    return;
  }
  const Bytes part = PartOf(other, random);
  if (random() % 2 == 0 && part.size() <= bytes.size()) {
    std::copy(part.begin(), part.end(), At(bytes, Below(bytes.size() - part.size() + 1, random)));
  } else {
    PutIn(bytes, part, max_size, random);
  }
}

}  // namespace datadist::fuzz
