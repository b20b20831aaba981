/* The reference of every ratio: one thread copies the same block lists inside one process. */
#include <stdint.h>
#include <string.h>

void copy_blocks(char *const *dst, char *const *src, int64_t tensors, const int64_t *dst_blocks,
                 const int64_t *src_blocks, int64_t blocks, int64_t block_bytes) {
  for (int64_t t = 0; t < tensors; ++t)
    for (int64_t i = 0; i < blocks; ++i)
      memcpy(dst[t] + dst_blocks[i] * block_bytes, src[t] + src_blocks[i] * block_bytes, (size_t)block_bytes);
}
