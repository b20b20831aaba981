// How inputs are changed where there is no libFuzzer to do it.
#ifndef DATADIST_FUZZ_MUTATE_H_
#define DATADIST_FUZZ_MUTATE_H_

#include <cstdint>
#include <random>
#include <vector>

namespace datadist::fuzz {

using Random = std::mt19937_64;

// One change: a bit, a byte, a number of note, bytes put in, taken out or repeated.
void MutateOnce(std::vector<uint8_t> &bytes, size_t max_size, Random &random);
// Puts a part of `other` into `bytes`.
void Splice(std::vector<uint8_t> &bytes, const std::vector<uint8_t> &other, size_t max_size, Random &random);

}  // namespace datadist::fuzz

#endif  // DATADIST_FUZZ_MUTATE_H_
