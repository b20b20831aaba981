// Ids of tokens or blocks as they are hashed: each as four bytes, the lowest first, which is how this machine has them. An
// id that four bytes do not hold, or that is kEscape, stands there as kEscape and eight bytes.
#ifndef DATADIST_CHANNEL_ID_TEXT_H_
#define DATADIST_CHANNEL_ID_TEXT_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/blake2b.h"

namespace datadist {

using IdText = std::vector<uint32_t>;
constexpr uint32_t kEscape = 0xffffffff;

void AppendId(IdText &text, int64_t id);
// Without null blocks (0), which stand for what a sliding window has left.
size_t CountBlocks(const IdText &text);
void HashIds(Blake2b &hash, const IdText &text);

}  // namespace datadist

#endif  // DATADIST_CHANNEL_ID_TEXT_H_
