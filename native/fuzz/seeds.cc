// Writes what the targets begin from: FOLDER/TARGET/NAME, one input of every kind, encoded as the engine does it. Made
// for each run, so that they are of the protocol of today.
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

#include "channel/messages.h"
#include "control/frame.h"
#include "control/messages.h"
#include "control/opening.h"
#include "fuzz/fuzz.h"
#include "transport/tcp/wire.h"

namespace datadist::fuzz {
namespace {

class Folder {
 public:
  explicit Folder(std::filesystem::path path) : path_(std::move(path)) {}

  // The input of a target that looks at its first byte, or bytes, for what the rest is.
  void Write(const std::string &target, Bytes head, const Bytes &rest) {
    std::filesystem::create_directories(path_ / target);
    head.insert(head.end(), rest.begin(), rest.end());
    std::ofstream file(path_ / target / (std::to_string(++written_)), std::ios::binary);
    file.write(reinterpret_cast<const char *>(head.data()), static_cast<std::streamsize>(head.size()));
    failed_ = failed_ || !file.flush();
  }
  void Write(const std::string &target, uint8_t head, std::string_view text) {
    Write(target, Bytes{head}, Bytes(text.begin(), text.end()));
  }
  bool failed() const { return failed_; }

 private:
  const std::filesystem::path path_;
  int written_ = 0;
  bool failed_ = false;
};

RemoteCache SomeCache() {
  RemoteCache cache;
  cache.cache_id = 3;
  cache.generation = 9;
  cache.geometry = CacheGeometry{llm_datadist::CachePlacement::kHost, CacheLayout::kMix, 2, 4, 4, 256, 64};
  cache.blob = Bytes(24, 0x5A);
  return cache;
}

EndpointInfo SomeEndpoint() {
  EndpointInfo info;
  info.cluster_id = 7;
  info.role = 3;
  info.transports = {{"cma", {}}, {"tcp", {4, 0}}};
  return info;
}

// In the order of kMessages in messages_fuzz.cc.
std::vector<Bytes> Messages() {
  CacheInfo info;
  info.target.cache = SomeCache();
  info.target.row = 3;
  const Status no_cache(llm_datadist::LLM_KV_CACHE_NOT_EXIST, "gone \xC3\xA4");
  return {
      Encode(Hello{{kProtocolVersion, kProtocolVersion}, SomeEndpoint(), 1234, true, LinkToken{1}, "comm", 5}),
      Encode(Welcome{SomeEndpoint(), {}}),
      Encode(Reject{Status(llm_datadist::LLM_ALREADY_LINK, "why")}),
      Encode(Ready{"tcp", "no process of this host"}),
      Encode(Attach{{}, Initiator::kServer, 15, {}}),
      Encode(DescribeRequest{CacheRef::Key(CacheKey{KeyKind::kPrefix, 5, 1})}),
      Encode(info),
      Encode(PushRequest{1, 2, 3, SomeCache(), 1, 1, 6, {{1, 2, 3}, {4, 5, 6}}}),
      Encode(Pushed{no_cache}),
      Encode(ConsumeRequest{CacheKey{KeyKind::kBlocks, 0, 7}, 3, 4, 5}),
      Encode(Consumed{no_cache}),
      Encode(UnlinkRequest{8, {}}),
      Bytes{4, 0, 4, 0},
      Bytes{},
      Encode(DigestRequest{3, 9, 0, 2, 1000, {{0, 64}, {128, 32}}}),
      Encode(Digests{Status::Ok(), {1, 2}}),
      Encode(ChannelGreeting{{kProtocolVersion, kProtocolVersion}, 7}),
      Encode(DescribeRank{"engine", {1}, {2, 3}, 4}),
      Encode(RankAnswer{Status::Ok(), {1, 2, 3}}),
      Encode(Renew{{LeaseToken{1}, LeaseToken{2}}, true}),
      Encode(Renewed{{LeaseToken{1}}}),
      Encode(Confirm{LeaseToken{1}, 5, {}}),
      Encode(Confirmed{LeaseVerdict::kHeld}),
      Encode(Release{{LeaseToken{1}}}),
      Encode(Await{LeaseToken{1}, RankId{2, 3}, 4, 5, 6}),
      Encode(HandoffNews{HandoffState::kBegun, 2, 3, 4, Bytes{5, 6}, {7, 8, 9, {10}}, "why \xC3\xA4"}),
      Encode(ReportProgress{{1}, {2, 3}, {{LeaseToken{4}, {5, 6, 7, {8}}}, {LeaseToken{9}, {10, 11, 11, {}}}}}),
      Encode(Offer{{1}, {2, 3}, 4, {5, 6}}),
      Encode(Offered{Status(llm_datadist::LLM_PARAM_INVALID, "why")}),
      Encode(Watch{{1}, {2, 3}, 4, 5}),
      Encode(Watched{1, {2}, 3, {4, 5}}),
      Encode(Deliver{{1}, {2, 3}, {4}, 5, {DeliveryState::kRunning, 6, 7, 8, 9, "why"}}),
      Encode(Declare{{1}, {2, 3}, 4, "why"}),
      Encode(Switch{{1}, InstanceRole::kDecode, 2, 3}),
      Encode(SwitchStatus{SwitchState::kRefused, InstanceRole::kBoth, 1, 2, 3, 4, "why"}),
  };
}

void WriteMessages(Folder &out) {
  const std::vector<Bytes> messages = Messages();
  for (size_t i = 0; i < messages.size(); ++i) {
    out.Write("messages", {static_cast<uint8_t>(i)}, messages[i]);
  }
}

void WriteFrames(Folder &out) {
  constexpr uint8_t kCuts = 9;
  Bytes stream = EncodeFrame(MessageType::kHello, 1, Messages().front());
  const Bytes second = EncodeFrame(MessageType::kPing, 2, {});
  stream.insert(stream.end(), second.begin(), second.end());
  out.Write("frames", {kCuts, 0, 0, 0, 0}, stream);
  out.Write("frames", {kCuts, 0, 0, 0, 0}, EncodeFrame(MessageType::kPush, 1, Bytes(2000, 0x5A)));
  out.Write("frames", {kCuts, 0, 0, 0, 1}, stream);  // gets its seals from the mutator
}

void WriteOpening(Folder &out) {
  Bytes open{kProtocolVersion, 0, kProtocolVersion, 0};
  open.insert(open.end(), 16, 0x77);                // nonce
  open.push_back(2);                                // keys
  open.insert(open.end(), sizeof(KeyId), 2);        // the second of the target's own
  open.insert(open.end(), sizeof(KeyId), 3);        // of nobody
  out.Write("opening", {0}, open);
  out.Write("opening", {1}, Bytes(sizeof(Digest), 0x55));
  Bytes opened(sizeof(KeyId), 1);
  opened.insert(opened.end(), 16 + sizeof(Digest), 0x66);
  out.Write("opening", {2}, opened);
}

void WriteTcpWire(Folder &out) {
  Writer request;
  EncodeRequest(RequestHeader{DataOp::kPull, 1000, 3, 9, 0, 2, 2, 2 * (64 + 32)}, {{0, 64}, {128, 32}}, request);
  out.Write("tcp_wire", {0}, request.Take());
  Writer response;
  EncodeResponse(Status(llm_datadist::LLM_PARAM_INVALID, "why"), 77, response);
  out.Write("tcp_wire", {1}, response.Take());
}

void WriteOptions(Folder &out) {
  using namespace std::string_view_literals;
  out.Write("options", 0, R"({"version": "1.3", "status": "completed", "net_instance_list": [{"a": [1, -2.5e3]}]})");
  out.Write("options", 0, R"({"memory_size": 2147483648, "page_shift": 16, "a\u00e4\"": true})");
  out.Write("options", 1,
            "llm.DeviceId=0\0llm.SyncKvCacheWaitTime=1000\0datadist.Transport=tcp\0llm.ListenIpInfo=[::1]:1"sv);
  out.Write("options", 1, "llm.DeviceId=0\0llm.MemPoolConfig={\"memory_size\": 4096}\0datadist.PeerAccess=read"sv);
  out.Write("options", 1,
            "llm.DeviceId=0\0datadist.TransferThreads=1\0datadist.TcpStreams=1\0datadist.HeartbeatMs=10\0"
            "datadist.MaxLinks=1\0datadist.MaxAddrsPerCache=1"sv);
}

void WriteText(Folder &out) {
  out.Write("text", 0, "one \xC3\xA4 line\n\xE2\x80\xA8 \xF0\x9F\x98\x80 and what is none \xFF\xC0\x80");
  out.Write("text", 0, std::string(3000, 'x'));
  out.Write("text", 1, "127.0.0.1:26000");
  out.Write("text", 1, "[fe80::1]:65535");
  out.Write("text", 2, "# keys\n" + std::string(64, 'a') + "\r\n\n" + std::string(64, 'B') + "\n");
}

}  // namespace
}  // namespace datadist::fuzz

int main(int count, char **arguments) {
  using namespace datadist::fuzz;  // NOLINT(google-build-using-namespace): this file's own
  if (count != 2) {
    std::fprintf(stderr, "usage: %s FOLDER\n", arguments[0]);
    return 2;
  }
  Folder out(arguments[1]);
  WriteMessages(out);
  WriteFrames(out);
  WriteOpening(out);
  WriteTcpWire(out);
  WriteOptions(out);
  WriteText(out);
  return out.failed() ? 1 : 0;
}
