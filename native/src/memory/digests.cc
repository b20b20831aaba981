#include "memory/digests.h"

#include <algorithm>
#include <array>

#include "base/crc32c.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_TIMEOUT;

// Between two looks at the clock.
constexpr uint64_t kStepBytes = 1U << 20;

Result<uint32_t> DigestOf(const CachePin &cache, TensorRange tensors, const Span &span, Deadline deadline) {
  uint32_t digest = 0;
  for (uint64_t tensor = 0; tensor < tensors.count; ++tensor) {
    const Result<std::byte *> bytes = cache.Resolve(tensors.first + tensor, span.offset, span.length);
    if (!bytes.ok()) {
      return bytes.status();
    }
    // Also where there are no bytes: whoever asks for more than its deadline allows does not keep a thread.
    uint64_t done = 0;
    do {
      if (deadline.Expired()) {
        return Status(LLM_TIMEOUT, "digests not made in time");
      }
      const uint64_t step = std::min(kStepBytes, span.length - done);
      digest = Crc32c(bytes.value() + done, step, digest);
      done += step;
    } while (done < span.length);
  }
  return digest;
}

}  // namespace

std::vector<Run> BlocksOf(const std::vector<Run> &runs, uint64_t block_bytes) {
  const uint64_t most = std::max<uint64_t>(block_bytes, 1);
  std::vector<Run> blocks;
  for (const Run &run : runs) {
    for (uint64_t done = 0; done < run.length; done += most) {
      blocks.push_back({run.remote_offset + done, run.local_offset + done, std::min(most, run.length - done)});
    }
  }
  return blocks;
}

Result<std::vector<uint32_t>> DigestsOf(const CachePin &cache, TensorRange tensors, const std::vector<Span> &spans,
                                        Deadline deadline) {
  std::vector<uint32_t> digests;
  digests.reserve(spans.size());
  for (const Span &span : spans) {
    const Result<uint32_t> digest = DigestOf(cache, tensors, span, deadline);
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
