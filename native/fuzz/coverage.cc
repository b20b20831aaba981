#include "fuzz/coverage.h"

#include <bitset>
#include <cstdint>
#include <utility>

namespace datadist::fuzz {
namespace {

constexpr size_t kPlaces = size_t{1} << 20;
std::bitset<kPlaces> reached;
bool something_new = false;

}  // namespace

size_t PlacesReached() { return reached.count(); }
bool ReachedSomethingNew() { return std::exchange(something_new, false); }

}  // namespace datadist::fuzz

// Called by what is compiled with -fsanitize-coverage=trace-pc, at every place where the program can go two ways.
extern "C" void __sanitizer_cov_trace_pc() {
  using namespace datadist::fuzz;  // NOLINT(google-build-using-namespace): this file's own
  const size_t place = reinterpret_cast<uintptr_t>(__builtin_return_address(0)) % kPlaces;
  if (!reached[place]) {
    reached[place] = true;
    something_new = true;
  }
}
