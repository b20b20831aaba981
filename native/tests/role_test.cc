// SetRole: its state table, its refusals, and data flowing each way after a switch.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "support/eventually.h"
#include "support/node.h"

namespace datadist::testing {
namespace {

using namespace llm_datadist;  // the codes, which every line here names
using ::testing::HasSubstr;

constexpr Shape kShape{2, 4, 64};

std::map<AscendString, AscendString> Listen(const std::string &address) {
  return ToAscend({{OPTION_LISTEN_IP_INFO, address}});
}
std::string At(uint16_t port) { return std::string(kLoopback) + ":" + std::to_string(port); }

bool Listens(Node &node) { return node.port() != 0; }

// A peer that can link to `port` if somebody listens there.
Status LinkFromOutside(uint16_t port) {
  Node client(77);
  EXPECT_EQ(client.Start(ClientOptions()), LLM_SUCCESS);
  return client.Link(0, port);
}

TEST(SetRole, Arguments) {
  Node node(1);
  EXPECT_EQ(node.datadist().SetRole(LlmRole::kPrompt), LLM_FAILED);
  ASSERT_EQ(node.Start(ClientOptions()), LLM_SUCCESS);
  for (const int32_t role : {0, 4, -1}) {
    EXPECT_EQ(node.datadist().SetRole(static_cast<LlmRole>(role)), LLM_PARAM_INVALID) << role;
  }
  EXPECT_EQ(node.datadist().SetRole(LlmRole::kPrompt, Listen("127.0.0.1")), LLM_PARAM_INVALID);
  EXPECT_THAT(GetLastErrorText(), HasSubstr("llm.ListenIpInfo: '127.0.0.1'"));
  EXPECT_EQ(node.datadist().SetRole(LlmRole::kMix), LLM_SUCCESS) << "the same role is allowed";
}

TEST(SetRole, ListenerFollowsTheOption) {
  Node node(1);
  ASSERT_EQ(node.Start(ClientOptions()), LLM_SUCCESS);
  EXPECT_EQ(node.datadist().SetRole(LlmRole::kDecoder), LLM_SUCCESS);
  EXPECT_FALSE(Listens(node)) << "not listening, no option: stays so";

  ASSERT_EQ(node.datadist().SetRole(LlmRole::kPrompt, Listen(At(0))), LLM_SUCCESS) << GetLastErrorText();
  const uint16_t first = node.port();
  ASSERT_NE(first, 0);
  EXPECT_EQ(LinkFromOutside(first), LLM_SUCCESS) << GetLastErrorText();
  std::vector<Status> rets;
  ASSERT_EQ(node.datadist().UnlinkLlmClusters({Cluster(77, 1)}, rets, 1000, true), LLM_SUCCESS);

  EXPECT_EQ(node.datadist().SetRole(LlmRole::kPrompt, Listen(At(first))), LLM_SUCCESS) << "the same address";
  EXPECT_EQ(node.port(), first);

  Node other(2);
  ASSERT_EQ(other.Start(ServerOptions()), LLM_SUCCESS);
  EXPECT_EQ(node.datadist().SetRole(LlmRole::kPrompt, Listen(At(other.port()))), LLM_FAILED) << "taken";
  EXPECT_FALSE(Listens(node)) << "no listener remains when the new one cannot start";
  EXPECT_EQ(LinkFromOutside(first), LLM_LINK_FAILED);

  ASSERT_EQ(node.datadist().SetRole(LlmRole::kPrompt, Listen(At(0))), LLM_SUCCESS);
  const uint16_t second = node.port();
  ASSERT_EQ(node.datadist().SetRole(LlmRole::kPrompt, Listen("127.0.0.2:" + std::to_string(second))), LLM_SUCCESS);
  EXPECT_EQ(LinkFromOutside(second), LLM_LINK_FAILED) << "another ip with the same port is another address";

  EXPECT_EQ(node.datadist().SetRole(LlmRole::kDecoder), LLM_SUCCESS);
  EXPECT_FALSE(Listens(node)) << "listening, no option: stops";
}

TEST(SetRole, RefusedWhileLinksExistAlsoLostOnesThatWereAskedForHere) {
  Node server(1);
  ASSERT_EQ(server.Start(ServerOptions()), LLM_SUCCESS);
  const uint16_t port = server.port();
  Node client(2);
  ASSERT_EQ(client.Start(ClientOptions()), LLM_SUCCESS);
  ASSERT_EQ(client.Link(1, port), LLM_SUCCESS) << GetLastErrorText();
  EXPECT_EQ(client.datadist().SetRole(LlmRole::kPrompt), LLM_EXIST_LINK);
  EXPECT_EQ(server.datadist().SetRole(LlmRole::kDecoder), LLM_EXIST_LINK);
  EXPECT_EQ(server.port(), port) << "nothing changed";
  server.datadist().Finalize();
  EXPECT_EQ(client.datadist().SetRole(LlmRole::kPrompt), LLM_EXIST_LINK) << "the entry stays until it is unlinked";
  ASSERT_EQ(client.Unlink(1, port, 1000, true), LLM_SUCCESS);
  EXPECT_EQ(client.datadist().SetRole(LlmRole::kPrompt), LLM_SUCCESS);
}

TEST(SetRole, AllowedWhenThePeersThatAskedForTheirLinksAreGone) {
  Node server(1);
  ASSERT_EQ(server.Start(ServerOptions()), LLM_SUCCESS);
  Node client(2);
  ASSERT_EQ(client.Start(ClientOptions()), LLM_SUCCESS);
  ASSERT_EQ(client.Link(1, server.port()), LLM_SUCCESS) << GetLastErrorText();
  client.datadist().Finalize();
  EXPECT_TRUE(Eventually([&] { return server.datadist().SetRole(LlmRole::kDecoder) == LLM_SUCCESS; }));
}

TEST(SetRole, ServerAndClientChangePlacesAndDataFlows) {
  Node a(1, LlmRole::kPrompt);
  Node b(2, LlmRole::kDecoder);
  ASSERT_EQ(a.Start(ServerOptions()), LLM_SUCCESS);
  ASSERT_EQ(b.Start(ClientOptions()), LLM_SUCCESS);
  const int64_t of_a = a.AddCache(kShape, 1);
  const int64_t of_b = b.AddCache(kShape, 2);
  ASSERT_EQ(b.Link(1, a.port()), LLM_SUCCESS);
  ASSERT_EQ(b.Pull(1, of_a, of_b, {0}, {3}), LLM_SUCCESS) << GetLastErrorText();
  ASSERT_EQ(b.Unlink(1, a.port()), LLM_SUCCESS) << GetLastErrorText();

  ASSERT_EQ(a.datadist().SetRole(LlmRole::kDecoder), LLM_SUCCESS) << GetLastErrorText();
  ASSERT_EQ(b.datadist().SetRole(LlmRole::kPrompt, Listen(At(0))), LLM_SUCCESS) << GetLastErrorText();
  ASSERT_EQ(a.Link(2, b.port()), LLM_SUCCESS) << GetLastErrorText();
  Bytes expected = a.Contents(of_a);
  CopyBlocks(b.Contents(of_b), kShape, expected, kShape, {3, 1}, {1, 2});
  ASSERT_EQ(a.Pull(2, of_b, of_a, {3, 1}, {1, 2}), LLM_SUCCESS) << GetLastErrorText();
  EXPECT_EQ(a.Contents(of_a), expected);
}

TEST(SetRole, HixlKeepsItsListener) {
  Node node(1);
  ASSERT_EQ(node.Start(ServerOptions({{OPTION_TRANSFER_BACKEND, "hixl"}})), LLM_SUCCESS) << GetLastErrorText();
  const uint16_t port = node.port();
  EXPECT_EQ(node.datadist().SetRole(LlmRole::kDecoder), LLM_SUCCESS);
  EXPECT_EQ(node.datadist().SetRole(LlmRole::kDecoder, Listen(At(0))), LLM_SUCCESS) << "as at Initialize";
  EXPECT_EQ(node.datadist().SetRole(LlmRole::kDecoder, Listen(At(9))), LLM_FEATURE_NOT_ENABLED);
  EXPECT_EQ(node.port(), port);
  Node client(2);
  ASSERT_EQ(client.Start(ClientOptions()), LLM_SUCCESS);
  ASSERT_EQ(client.Link(1, port), LLM_SUCCESS) << GetLastErrorText();
  EXPECT_EQ(node.datadist().SetRole(LlmRole::kPrompt), LLM_SUCCESS) << "links are not looked at";
}

}  // namespace
}  // namespace datadist::testing
