// The decoder reads the prompt's cache: one row, some blocks, one layer. The prompt makes no call meanwhile.
#include "cache_memory.h"
#include "example.h"

namespace {

using example::Check;
using example::kBlockBytes;
using example::kDecoderCluster;
using example::kPromptCluster;
using example::kTensors;

void Prompt(const example::Arguments &arguments, example::Meeting &meeting) {
  example::CacheMemory memory(kPromptCluster);
  example::Endpoint prompt(kPromptCluster, llm_datadist::LlmRole::kPrompt, &arguments.prompt);
  const example::RegisteredCache cache(prompt, memory);

  meeting.Tell(cache.IdText());  // registered before it is linked: only then do peers see it
  meeting.Expect("done");
  memory.Verify();
}

// PullKvCache: row 2 of every tensor into row 1, and the first half of row 3 into row 0.
void PullRows(example::Endpoint &decoder, int64_t remote_cache, const llm_datadist::Cache &local,
              example::CacheMemory &memory) {
  Check(decoder->PullKvCache({kPromptCluster, remote_cache, 2, {}}, local, 1), "PullKvCache");
  Check(decoder->PullKvCache({kPromptCluster, remote_cache, 3, {}}, local, 0, kBlockBytes / 2), "PullKvCache, half");
  for (size_t tensor = 0; tensor < kTensors; ++tensor) {
    memory.Expect(tensor, 1, kPromptCluster, tensor, 2);
    memory.Expect(tensor, 0, kPromptCluster, tensor, 3, kBlockBytes / 2);
  }
  memory.Verify();
}

// PullKvBlocks: block 0 to 2, then 1 to 3 (one run of bytes), then 3 to 0.
void PullBlocks(example::Endpoint &decoder, int64_t remote_cache, const llm_datadist::Cache &local,
                example::CacheMemory &memory) {
  const std::vector<uint64_t> src_blocks{0, 1, 3};
  const std::vector<uint64_t> dst_blocks{2, 3, 0};
  Check(decoder->PullKvBlocks({kPromptCluster, remote_cache, 0, {}}, local, src_blocks, dst_blocks), "PullKvBlocks");
  for (size_t tensor = 0; tensor < kTensors; ++tensor) {
    for (size_t i = 0; i < src_blocks.size(); ++i) {
      memory.Expect(tensor, dst_blocks[i], kPromptCluster, tensor, src_blocks[i]);
    }
  }
  memory.Verify();
}

// Layer 2 of the prompt (tensors 4 and 5) into our layer 0 (tensors 0 and 1).
void PullLayer(example::Endpoint &decoder, int64_t remote_cache, const llm_datadist::Cache &local,
               example::CacheMemory &memory) {
  const llm_datadist::KvCacheExtParam layer{{2, 2}, {0, 0}, 2, {}};
  Check(decoder->PullKvBlocks({kPromptCluster, remote_cache, 0, {}}, local, {1}, {1}, layer), "PullKvBlocks, layer 2");
  memory.Expect(0, 1, kPromptCluster, 4, 1);
  memory.Expect(1, 1, kPromptCluster, 5, 1);
  memory.Verify();
}

void Decoder(const example::Arguments &arguments, example::Meeting &meeting) {
  example::CacheMemory memory(kDecoderCluster);
  example::Endpoint decoder(kDecoderCluster, llm_datadist::LlmRole::kDecoder, nullptr);
  const example::RegisteredCache cache(decoder, memory);

  const int64_t remote_cache = std::stoll(meeting.Hear());
  example::Link link(decoder, kPromptCluster, arguments.decoder, arguments.prompt);
  PullRows(decoder, remote_cache, cache.cache(), memory);
  PullBlocks(decoder, remote_cache, cache.cache(), memory);
  PullLayer(decoder, remote_cache, cache.cache(), memory);
  link.Unlink();
  meeting.Tell("done");
}

}  // namespace

int main(int argc, char **argv) { return example::Run(argc, argv, Prompt, Decoder); }
