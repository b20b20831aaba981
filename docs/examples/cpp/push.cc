// The prompt writes into the decoder's cache: one row, some blocks, one layer. The decoder makes no call meanwhile.
#include "cache_memory.h"
#include "example.h"

namespace {

using example::Check;
using example::kDecoderCluster;
using example::kPromptCluster;
using example::kTensors;

const std::vector<uint64_t> kSrcBlocks{3, 0, 1};
const std::vector<uint64_t> kDstBlocks{0, 2, 3};

void Prompt(const example::Arguments &arguments, example::Meeting &meeting) {
  example::CacheMemory memory(kPromptCluster);
  example::Endpoint prompt(kPromptCluster, llm_datadist::LlmRole::kPrompt, nullptr);
  const example::RegisteredCache cache(prompt, memory);

  const int64_t remote_cache = std::stoll(meeting.Hear());
  example::Link link(prompt, kDecoderCluster, arguments.prompt, arguments.decoder);

  // Row 2 of every tensor into row 1.
  Check(prompt->PushKvCache(cache.cache(), {kDecoderCluster, remote_cache, 1, {}}, 2), "PushKvCache");
  meeting.Tell("row");
  meeting.Expect("next");

  Check(prompt->PushKvBlocks(cache.cache(), {kDecoderCluster, remote_cache, 0, {}}, kSrcBlocks, kDstBlocks),
        "PushKvBlocks");
  meeting.Tell("blocks");
  meeting.Expect("next");

  // Our layer 0 (tensors 0 and 1) into layer 3 of the decoder (tensors 6 and 7), row 0 into row 1.
  const llm_datadist::KvCacheExtParam layer{{0, 0}, {3, 3}, 2, {}};
  Check(prompt->PushKvCache(cache.cache(), {kDecoderCluster, remote_cache, 1, {}}, 0, -1, layer),
        "PushKvCache, layer 0");
  link.Unlink();
  meeting.Tell("layer");
  memory.Verify();
}

void Decoder(const example::Arguments &arguments, example::Meeting &meeting) {
  example::CacheMemory memory(kDecoderCluster);
  example::Endpoint decoder(kDecoderCluster, llm_datadist::LlmRole::kDecoder, &arguments.decoder);
  const example::RegisteredCache cache(decoder, memory);
  meeting.Tell(cache.IdText());

  meeting.Expect("row");
  for (size_t tensor = 0; tensor < kTensors; ++tensor) {
    memory.Expect(tensor, 1, kPromptCluster, tensor, 2);
  }
  memory.Verify();
  meeting.Tell("next");

  meeting.Expect("blocks");
  for (size_t tensor = 0; tensor < kTensors; ++tensor) {
    for (size_t i = 0; i < kSrcBlocks.size(); ++i) {
      memory.Expect(tensor, kDstBlocks[i], kPromptCluster, tensor, kSrcBlocks[i]);
    }
  }
  memory.Verify();
  meeting.Tell("next");

  meeting.Expect("layer");
  memory.Expect(6, 1, kPromptCluster, 0, 0);
  memory.Expect(7, 1, kPromptCluster, 1, 0);
  memory.Verify();
}

}  // namespace

int main(int argc, char **argv) { return example::Run(argc, argv, Prompt, Decoder); }
