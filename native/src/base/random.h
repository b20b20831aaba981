// Bytes that nobody can guess, from the kernel's generator.
#ifndef DATADIST_BASE_RANDOM_H_
#define DATADIST_BASE_RANDOM_H_

#include <array>
#include <cstdint>

#include "base/status.h"

namespace datadist {

Result<std::array<uint8_t, 16>> RandomBytes();

}  // namespace datadist

#endif  // DATADIST_BASE_RANDOM_H_
