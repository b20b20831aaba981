// Digests of blocks: what two ends compare to know that the bytes of one are those of the other.
#ifndef DATADIST_MEMORY_DIGESTS_H_
#define DATADIST_MEMORY_DIGESTS_H_

#include <cstdint>
#include <vector>

#include "base/deadline.h"
#include "base/status.h"
#include "memory/region_table.h"
#include "memory/spans.h"

namespace datadist {

// The same bytes block by block.
std::vector<Run> BlocksOf(const std::vector<Run> &runs, uint64_t block_bytes);

// One value per span, over the tensors in their order. LLM_PARAM_INVALID for a span outside of the cache, LLM_TIMEOUT.
Result<std::vector<uint32_t>> DigestsOf(const CachePin &cache, TensorRange tensors, const std::vector<Span> &spans,
                                        Deadline deadline);

// LLM_FAILED where a changed bit leaves a digest as it was: a detector that detects nothing is worse than none.
Status CheckDetector();

}  // namespace datadist

#endif  // DATADIST_MEMORY_DIGESTS_H_
