// What the example programs share: an endpoint, its cache memory with guards around every tensor, and a way for two
// processes to wait for each other.
#ifndef LLM_DATADIST_EXAMPLE_H_
#define LLM_DATADIST_EXAMPLE_H_

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "llm_datadist/llm_datadist.h"
#include "meeting.h"

#if __has_include("llm_datadist/llm_datadist_ext.h")  // this library tells reasons in words; the original does not
#include "llm_datadist/llm_datadist_ext.h"
#endif

namespace example {

using llm_datadist::LlmDataDist;

constexpr uint64_t kPromptCluster = 1;
constexpr uint64_t kDecoderCluster = 2;
constexpr int32_t kLinkTimeoutMs = 10'000;

inline std::string Describe(llm_datadist::Status status) {
  char text[32];
  std::snprintf(text, sizeof(text), "0x%08X", static_cast<unsigned>(status));
#if __has_include("llm_datadist/llm_datadist_ext.h")
  return std::string(text) + " " + llm_datadist::GetLastErrorText();
#else
  return text;
#endif
}

inline void Require(bool condition, const std::string &what) {
  if (!condition) {
    throw std::runtime_error(what);
  }
}

inline void Check(llm_datadist::Status status, const std::string &call) {
  Require(status == llm_datadist::LLM_SUCCESS, call + ": " + Describe(status));
  std::printf("%s: ok\n", call.c_str());
}

struct Address {
  std::string ip;
  uint16_t port = 0;

  static Address Parse(const std::string &text) {
    const size_t colon = text.rfind(':');
    const int port = colon == std::string::npos ? 0 : std::atoi(text.c_str() + colon + 1);
    Require(port > 0 && port <= 65535, "address '" + text + "'; allowed: IP:PORT, port 1 to 65535");
    return {text.substr(0, colon), static_cast<uint16_t>(port)};
  }

  std::string Text() const { return ip + ":" + std::to_string(port); }
  llm_datadist::IpInfo Info() const { return {ip.c_str(), port, {}}; }
};

// The command line of every example: PROGRAM prompt|decoder PROMPT_IP:PORT DECODER_IP:PORT DIRECTORY
struct Arguments {
  bool is_prompt = false;
  Address prompt;
  Address decoder;
  std::string directory;

  static Arguments Parse(int count, char **values) {
    const std::string role = count == 5 ? values[1] : "";
    Require(role == "prompt" || role == "decoder", "usage: prompt|decoder PROMPT_IP:PORT DECODER_IP:PORT DIRECTORY");
    return {role == "prompt", Address::Parse(values[2]), Address::Parse(values[3]), values[4]};
  }
};

// An initialised LlmDataDist. With an address it is a server, which clients may link with.
class Endpoint {
 public:
  Endpoint(uint64_t cluster_id, llm_datadist::LlmRole role, const Address *listen) : datadist_(cluster_id, role) {
    std::map<llm_datadist::AscendString, llm_datadist::AscendString> options;
    options[llm_datadist::OPTION_DEVICE_ID] = "0";
    options[llm_datadist::OPTION_SYNC_CACHE_WAIT_TIME] = "10000";
    if (listen != nullptr) {
      options[llm_datadist::OPTION_LISTEN_IP_INFO] = listen->Text().c_str();
    }
    Check(datadist_.Initialize(options), "Initialize");
  }
  ~Endpoint() { datadist_.Finalize(); }
  Endpoint(const Endpoint &) = delete;
  Endpoint &operator=(const Endpoint &) = delete;

  LlmDataDist *operator->() { return &datadist_; }

 private:
  LlmDataDist datadist_;
};

// A client's link with a server. Unlink() drops both halves, which the server must live to see; without it (an error is
// on its way out) only our half is dropped.
class Link {
 public:
  Link(Endpoint &client, uint64_t server_cluster, const Address &local, const Address &server) : client_(client) {
    clusters_.push_back({server_cluster, 0, {local.Info()}, {server.Info()}, {}});
    std::vector<llm_datadist::Status> rets;
    Check(client_->LinkLlmClusters(clusters_, rets, kLinkTimeoutMs), "LinkLlmClusters");
  }
  ~Link() {
    std::vector<llm_datadist::Status> rets;
    client_->UnlinkLlmClusters(clusters_, rets, kLinkTimeoutMs, true);  // a success when there is none any more
  }
  Link(const Link &) = delete;
  Link &operator=(const Link &) = delete;

  void Unlink() {
    std::vector<llm_datadist::Status> rets;
    Check(client_->UnlinkLlmClusters(clusters_, rets, kLinkTimeoutMs), "UnlinkLlmClusters");
  }

 private:
  Endpoint &client_;
  std::vector<llm_datadist::ClusterInfo> clusters_;
};

// main() of every example: a failure ends in a message and a status that is not 0.
template <typename Prompt, typename Decoder>
int Run(int count, char **values, Prompt prompt, Decoder decoder) {
  try {
    std::setvbuf(stdout, nullptr, _IOLBF, 0);
    const Arguments arguments = Arguments::Parse(count, values);
    Meeting meeting(arguments.directory, arguments.is_prompt);
    arguments.is_prompt ? prompt(arguments, meeting) : decoder(arguments, meeting);
    std::printf("every byte is right\n");
    return 0;
  } catch (const std::exception &error) {
    std::fprintf(stderr, "FAILED: %s\n", error.what());
    return 1;
  }
}

}  // namespace example

#endif  // LLM_DATADIST_EXAMPLE_H_
