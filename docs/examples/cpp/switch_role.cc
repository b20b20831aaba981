// Two processes change roles twice. Who is client links and reads the other's memory; who is server listens.
//
//   round   server    client
//   0       prompt    decoder
//   1       decoder   prompt
//   2       prompt    decoder
#include "cache_memory.h"
#include "example.h"

namespace {

using example::Check;
using example::kDecoderCluster;
using example::kPromptCluster;
using example::kTensors;
using llm_datadist::LlmRole;

constexpr int kRounds = 3;

class Process {
 public:
  Process(uint64_t own_cluster, uint64_t peer_cluster, const example::Address &own, const example::Address &peer,
          bool server_first, example::Meeting &meeting)
      : own_cluster_(own_cluster),
        peer_cluster_(peer_cluster),
        own_(own),
        peer_(peer),
        server_first_(server_first),
        meeting_(meeting),
        memory_(own_cluster),
        endpoint_(own_cluster, server_first ? LlmRole::kPrompt : LlmRole::kDecoder, server_first ? &own : nullptr),
        cache_(endpoint_, memory_) {}

  void Run() {
    meeting_.Tell(cache_.IdText());
    remote_cache_ = std::stoll(meeting_.Hear());
    for (int round = 0; round < kRounds; ++round) {
      const bool server = (round % 2 == 0) == server_first_;
      std::printf("round %d: cluster %d is the %s\n", round, static_cast<int>(own_cluster_),
                  server ? "server" : "client");
      if (round > 0) {
        TakeSide(server);
      }
      server ? Serve() : ReadBlock(static_cast<size_t>(round));
    }
    memory_.Verify();
  }

 private:
  void TakeSide(bool server) {
    std::map<llm_datadist::AscendString, llm_datadist::AscendString> options;
    if (server) {
      options[llm_datadist::OPTION_LISTEN_IP_INFO] = own_.Text().c_str();
    }
    Check(endpoint_->SetRole(server ? LlmRole::kPrompt : LlmRole::kDecoder, options), "SetRole");
  }

  void Serve() {
    meeting_.Tell("listening");
    meeting_.Expect("unlinked");
  }

  // Block `round` of every tensor of the peer into the same place here.
  void ReadBlock(size_t round) {
    meeting_.Expect("listening");
    example::Link link(endpoint_, peer_cluster_, own_, peer_);
    example::Require(endpoint_->SetRole(LlmRole::kMix) == llm_datadist::LLM_EXIST_LINK,
                     "SetRole is refused with LLM_EXIST_LINK while a link exists");
    Check(endpoint_->PullKvBlocks({peer_cluster_, remote_cache_, 0, {}}, cache_.cache(), {round}, {round}),
          "PullKvBlocks");
    for (size_t tensor = 0; tensor < kTensors; ++tensor) {
      memory_.Expect(tensor, round, peer_cluster_, tensor, round);
    }
    memory_.Verify();
    link.Unlink();
    meeting_.Tell("unlinked");
  }

  const uint64_t own_cluster_;
  const uint64_t peer_cluster_;
  const example::Address own_;
  const example::Address peer_;
  const bool server_first_;
  example::Meeting &meeting_;
  int64_t remote_cache_ = -1;
  example::CacheMemory memory_;
  example::Endpoint endpoint_;
  example::RegisteredCache cache_;
};

void Prompt(const example::Arguments &arguments, example::Meeting &meeting) {
  Process(kPromptCluster, kDecoderCluster, arguments.prompt, arguments.decoder, true, meeting).Run();
}

void Decoder(const example::Arguments &arguments, example::Meeting &meeting) {
  Process(kDecoderCluster, kPromptCluster, arguments.decoder, arguments.prompt, false, meeting).Run();
}

}  // namespace

int main(int argc, char **argv) { return example::Run(argc, argv, Prompt, Decoder); }
