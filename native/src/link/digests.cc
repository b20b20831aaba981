#include "link/digests.h"

#include <algorithm>
#include <array>

#include "base/crc32c.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_TIMEOUT;

// Between two looks at the clock.
constexpr uint64_t kStepBytes = 1U << 20;

Result<uint32_t> DigestOfRange(const CachePin &cache, const DigestRequest &request, const DigestRequest::Range &range,
                               Deadline deadline) {
  uint32_t digest = 0;
  for (uint64_t tensor = 0; tensor < request.tensor_count; ++tensor) {
    const Result<std::byte *> bytes = cache.Resolve(request.first_tensor + tensor, range.offset, range.length);
    if (!bytes.ok()) {
      return bytes.status();
    }
    // Also where there are no bytes: whoever asks for more than its deadline allows does not keep a thread.
    uint64_t done = 0;
    do {
      if (deadline.Expired()) {
        return Status(LLM_TIMEOUT, "digests not made in time");
      }
      const uint64_t step = std::min(kStepBytes, range.length - done);
      digest = Crc32c(bytes.value() + done, step, digest);
      done += step;
    } while (done < range.length);
  }
  return digest;
}

}  // namespace

std::vector<DigestPair> DigestPairs(const TransferOp &op) {
  const uint64_t block = std::max<uint64_t>(op.remote->geometry.stride, 1);
  std::vector<DigestPair> pairs;
  for (const Run &run : op.runs) {
    for (uint64_t done = 0; done < run.length; done += block) {
      if (pairs.empty() || pairs.back().remote.ranges.size() == kMaxDigestRanges) {
        DigestPair pair;
        pair.remote.cache_id = op.remote->cache_id;
        pair.remote.generation = op.remote->generation;
        pair.remote.first_tensor = op.remote_first_tensor;
        pair.local.first_tensor = op.local_first_tensor;
        pair.remote.tensor_count = pair.local.tensor_count = op.tensor_count;
        pairs.push_back(std::move(pair));
      }
      const uint64_t length = std::min(block, run.length - done);
      pairs.back().remote.ranges.push_back({run.remote_offset + done, length});
      pairs.back().local.ranges.push_back({run.local_offset + done, length});
    }
  }
  return pairs;
}

Result<std::vector<uint32_t>> DigestsOf(const CachePin &cache, const DigestRequest &request, Deadline deadline) {
  std::vector<uint32_t> digests;
  digests.reserve(request.ranges.size());
  for (const DigestRequest::Range &range : request.ranges) {
    const Result<uint32_t> digest = DigestOfRange(cache, request, range, deadline);
    if (!digest.ok()) {
      return digest.status();
    }
    digests.push_back(digest.value());
  }
  return digests;
}

Status CheckDetector() {
  std::array<uint8_t, 4096> block{};
  const uint32_t before = Crc32c(block.data(), block.size());
  for (const size_t at : {size_t{0}, size_t{7}, size_t{2049}, block.size() - 1}) {
    block[at] = 1;
    if (Crc32c(block.data(), block.size()) == before) {
      return Status(LLM_FAILED, "the digest of a block does not see a change at byte " + std::to_string(at));
    }
    block[at] = 0;
  }
  return Status::Ok();
}

}  // namespace datadist
