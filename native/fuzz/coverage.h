// What inputs have reached, where the engine was compiled to say it (preset `fuzz`).
#ifndef DATADIST_FUZZ_COVERAGE_H_
#define DATADIST_FUZZ_COVERAGE_H_

#include <cstddef>

namespace datadist::fuzz {

size_t PlacesReached();
// Whether a place was reached for the first time since this was asked last.
bool ReachedSomethingNew();

}  // namespace datadist::fuzz

#endif  // DATADIST_FUZZ_COVERAGE_H_
