// Block indices as Python hands them over.
#ifndef DATADIST_BINDINGS_BLOCK_IDS_H_
#define DATADIST_BINDINGS_BLOCK_IDS_H_

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "base/status.h"

namespace datadist::bindings {

// Takes a sequence of int, or a contiguous one-dimensional buffer of int64 or uint64 without touching its elements as
// Python objects. Anything else raises TypeError naming `field`; an index that no cache can have is LLM_PARAM_INVALID.
Result<std::vector<uint64_t>> ReadBlockIds(pybind11::handle ids, const char *field);

struct BlockLists {
  std::vector<uint64_t> src;
  std::vector<uint64_t> dst;
};
// src_blocks and dst_blocks.
Result<BlockLists> ReadBlockLists(pybind11::handle src_blocks, pybind11::handle dst_blocks);

}  // namespace datadist::bindings

#endif  // DATADIST_BINDINGS_BLOCK_IDS_H_
