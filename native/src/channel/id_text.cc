#include "channel/id_text.h"

namespace datadist {

void AppendId(IdText &text, int64_t id) {
  if (id >= 0 && id < kEscape) {
    text.push_back(static_cast<uint32_t>(id));
    return;
  }
  const auto bits = static_cast<uint64_t>(id);
  text.insert(text.end(), {kEscape, static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)});
}

size_t CountBlocks(const IdText &text) {
  size_t count = 0;
  for (size_t i = 0; i < text.size(); i += text[i] == kEscape ? 3 : 1) {
    count += text[i] != 0 ? 1 : 0;
  }
  return count;
}

void HashIds(Blake2b &hash, const IdText &text) { hash.Update(text.data(), text.size() * sizeof(text[0])); }

}  // namespace datadist
