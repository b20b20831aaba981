// Digests of blocks: what two ends compare to know that the bytes of one are those of the other.
#ifndef DATADIST_LINK_DIGESTS_H_
#define DATADIST_LINK_DIGESTS_H_

#include <cstdint>
#include <vector>

#include "base/deadline.h"
#include "base/status.h"
#include "control/messages.h"
#include "memory/region_table.h"
#include "transport/transport.h"

namespace datadist {

// The same blocks, as each of the ends names them.
struct DigestPair {
  DigestRequest remote;
  DigestRequest local;
};

// The runs of an op block by block, in as many requests as they take.
std::vector<DigestPair> DigestPairs(const TransferOp &op);

// One value per range. LLM_PARAM_INVALID for a range outside of the cache, LLM_TIMEOUT.
Result<std::vector<uint32_t>> DigestsOf(const CachePin &cache, const DigestRequest &request, Deadline deadline);

// LLM_FAILED where a changed bit leaves a digest as it was: a detector that detects nothing is worse than none.
Status CheckDetector();

}  // namespace datadist

#endif  // DATADIST_LINK_DIGESTS_H_
