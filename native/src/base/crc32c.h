// CRC-32C (Castagnoli): tells a damaged or misread frame from a good one. Not a protection against forgery.
#ifndef DATADIST_BASE_CRC32C_H_
#define DATADIST_BASE_CRC32C_H_

#include <cstddef>
#include <cstdint>

namespace datadist {

// `before` is the checksum of the bytes that precede these, 0 for none.
uint32_t Crc32c(const void *data, size_t size, uint32_t before = 0);

}  // namespace datadist

#endif  // DATADIST_BASE_CRC32C_H_
