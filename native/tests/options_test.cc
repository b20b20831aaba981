// Options of Initialize: what is allowed, which error comes first, and that a refusal leaves the object usable.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "support/node.h"

namespace datadist::testing {
namespace {

using namespace llm_datadist;  // the codes, which every line here names
using ::testing::HasSubstr;

struct Refused {
  const char *key;
  const char *value;
};

class RefusedOption : public ::testing::TestWithParam<Refused> {};

TEST_P(RefusedOption, IsNamedAndLeavesTheObjectRetryable) {
  Node node(1);
  TextOptions options = {{OPTION_DEVICE_ID, "0"}};
  options[GetParam().key] = GetParam().value;
  EXPECT_EQ(node.Start(options), LLM_PARAM_INVALID);
  EXPECT_THAT(GetLastErrorText(), HasSubstr(GetParam().key));
  EXPECT_THAT(GetLastErrorText(), HasSubstr(GetParam().value));
  EXPECT_EQ(node.Start({{OPTION_DEVICE_ID, "0"}}), LLM_SUCCESS) << GetLastErrorText();
}

INSTANTIATE_TEST_SUITE_P(
    Values, RefusedOption,
    ::testing::Values(Refused{OPTION_DEVICE_ID, ""}, Refused{OPTION_DEVICE_ID, "-1"}, Refused{OPTION_DEVICE_ID, "x"},
                      Refused{OPTION_DEVICE_ID, "0;1"}, Refused{OPTION_DEVICE_ID, "2147483648"},
                      Refused{OPTION_DEVICE_ID, " 1"}, Refused{OPTION_LISTEN_IP_INFO, ""},
                      Refused{OPTION_LISTEN_IP_INFO, "127.0.0.1"}, Refused{OPTION_LISTEN_IP_INFO, "127.0.0.1:"},
                      Refused{OPTION_LISTEN_IP_INFO, "127.0.0.1:65536"}, Refused{OPTION_LISTEN_IP_INFO, "localhost:1"},
                      Refused{OPTION_LISTEN_IP_INFO, "::1:80"}, Refused{OPTION_LISTEN_IP_INFO, "[127.0.0.1]:80"},
                      Refused{OPTION_LISTEN_IP_INFO, "1.2.3.4:1;1.2.3.4:2"}, Refused{OPTION_TRANSFER_BACKEND, ""},
                      Refused{OPTION_TRANSFER_BACKEND, "hccl"}, Refused{OPTION_TRANSFER_BACKEND, "hixl"},
                      Refused{OPTION_SYNC_CACHE_WAIT_TIME, ""}, Refused{OPTION_SYNC_CACHE_WAIT_TIME, "0"},
                      Refused{OPTION_SYNC_CACHE_WAIT_TIME, "1s"}, Refused{OPTION_SYNC_CACHE_WAIT_TIME, "-5"},
                      Refused{"llm.RdmaTrafficClass", "x"}, Refused{"llm.LinkRetryCount", "101"},
                      Refused{"llm.LinkRetryCount", "0"}, Refused{"llm.RdmaServiceLevel", "-1"},
                      Refused{"llm.LinkTotalTime", "1s"},
                      Refused{"llm.EnableRemoteCacheAccessible", "2"}, Refused{OPTION_TRANSPORT, "rdma"},
                      Refused{OPTION_TRANSPORT, ""}, Refused{OPTION_TRANSFER_THREADS, "0"},
                      Refused{OPTION_TRANSFER_THREADS, "65"}, Refused{OPTION_TCP_STREAMS, "0"},
                      Refused{OPTION_TCP_STREAMS, "17"}, Refused{OPTION_HEARTBEAT_MS, "9"},
                      Refused{OPTION_HUGE_PAGES, "2"}, Refused{OPTION_HEARTBEAT_MS, "60001"},
                      Refused{OPTION_PEER_ACCESS, "write"},
                      Refused{OPTION_MAX_LINKS, "0"}, Refused{OPTION_MAX_ADDRS_PER_CACHE, "65537"},
                      Refused{OPTION_MAX_DEVICE_BYTES, "1GB"}, Refused{OPTION_MAX_HOST_BYTES, "18446744073709551616"},
                      Refused{"datadist.Transprot", "cma"}, Refused{OPTION_MAX_REGISTERED_ADDRS, "0"},
                      Refused{"llm.MemPoolConfig", ""}, Refused{"llm.MemPoolConfig", R"({"memory_size": -1})"},
                      Refused{"llm.HostMemPoolConfig", R"({"page_shift": 16})"},
                      Refused{"llm.HostMemPoolConfig", R"({"memory_size": 65536, "page_shift": 31})"}));

TEST(Options, AcceptedOnes) {
  for (const auto &[key, value] : std::initializer_list<std::pair<const char *, const char *>>{
           {OPTION_BUF_POOL_CFG, "anything"},
           {OPTION_ENABLE_SET_ROLE, "1"},
           {OPTION_GLOBAL_RESOURCE_CONFIG, "not json, but not read by the default backend"},
           {OPTION_LISTEN_IP_INFO, "127.0.0.1:0"},
           {OPTION_LISTEN_IP_INFO, "[::1]:0"},
           {OPTION_SYNC_CACHE_WAIT_TIME, "1"},
           {OPTION_TRANSPORT, "auto"},
           {"llm.MemPoolConfig", R"({"memory_size": 1048576, "page_shift": 12})"},
           {"llm.HostMemPoolConfig", R"({"memory_size": 1048576})"},
           {"llm.Role", "Mix"},
           {"some.OtherProgram", "1"}}) {
    SCOPED_TRACE(std::string(key) + "=" + value);
    Node node(1);
    EXPECT_EQ(node.Start(ClientOptions({{key, value}})), LLM_SUCCESS) << GetLastErrorText();
  }
}

TEST(Options, RoleComesFirst) {
  Node node(1, static_cast<LlmRole>(4));
  EXPECT_EQ(node.Start({}), LLM_PARAM_INVALID);
  EXPECT_THAT(GetLastErrorText(), HasSubstr("role: 4"));
}

TEST(Options, DeviceIdBeforeListenBeforeBackend) {
  Node node(1);
  EXPECT_EQ(node.Start({{OPTION_LISTEN_IP_INFO, "x"}, {OPTION_TRANSFER_BACKEND, "x"}}), LLM_PARAM_INVALID);
  EXPECT_THAT(GetLastErrorText(), HasSubstr(OPTION_DEVICE_ID));
  EXPECT_EQ(node.Start(ClientOptions({{OPTION_LISTEN_IP_INFO, "x"}, {OPTION_TRANSFER_BACKEND, "x"}})),
            LLM_PARAM_INVALID);
  EXPECT_THAT(GetLastErrorText(), HasSubstr(OPTION_LISTEN_IP_INFO));
  EXPECT_EQ(node.Start(ServerOptions({{OPTION_TRANSFER_BACKEND, "x"}, {OPTION_SYNC_CACHE_WAIT_TIME, ""}})),
            LLM_PARAM_INVALID);
  EXPECT_THAT(GetLastErrorText(), HasSubstr(OPTION_TRANSFER_BACKEND));
}

TEST(Options, BindFailureComesBeforeTheTransferTimeout) {
  Node first(1);
  ASSERT_EQ(first.Start(ServerOptions()), LLM_SUCCESS);
  const std::string taken = std::string(kLoopback) + ":" + std::to_string(first.port());
  Node second(2);
  EXPECT_EQ(second.Start(ClientOptions({{OPTION_LISTEN_IP_INFO, taken}, {OPTION_SYNC_CACHE_WAIT_TIME, ""}})),
            LLM_FAILED);
  EXPECT_THAT(GetLastErrorText(), HasSubstr(taken));
}

TEST(Options, TransferTimeoutComesBeforeMemoryPools) {
  Node node(1);
  EXPECT_EQ(node.Start(ClientOptions({{OPTION_SYNC_CACHE_WAIT_TIME, "x"}, {"llm.MemPoolConfig", "{"}})),
            LLM_PARAM_INVALID);
  EXPECT_THAT(GetLastErrorText(), HasSubstr(OPTION_SYNC_CACHE_WAIT_TIME));
}

TEST(Options, HixlNeedsAListenerAndWellFormedJson) {
  Node node(1);
  EXPECT_EQ(node.Start(ServerOptions({{OPTION_TRANSFER_BACKEND, "hixl"}, {OPTION_GLOBAL_RESOURCE_CONFIG, "{"}})),
            LLM_PARAM_INVALID);
  EXPECT_THAT(GetLastErrorText(), HasSubstr(OPTION_GLOBAL_RESOURCE_CONFIG));
  EXPECT_EQ(node.Start(ServerOptions({{OPTION_TRANSFER_BACKEND, "hixl"}, {OPTION_GLOBAL_RESOURCE_CONFIG, "{}"}})),
            LLM_SUCCESS)
      << GetLastErrorText();
}

TEST(Options, LinksOverIpv6) {
  Node server(1);
  Node client(2);
  ASSERT_EQ(server.Start(ClientOptions({{OPTION_LISTEN_IP_INFO, "[::1]:0"}})), LLM_SUCCESS) << GetLastErrorText();
  ASSERT_EQ(client.Start(ClientOptions()), LLM_SUCCESS);
  ClusterInfo cluster = Cluster(1, server.port());
  cluster.remote_ip_infos[0].ip = "::1";
  std::vector<Status> rets;
  EXPECT_EQ(client.datadist().LinkLlmClusters({cluster}, rets), LLM_SUCCESS) << GetLastErrorText();
}

}  // namespace
}  // namespace datadist::testing
