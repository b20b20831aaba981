// Every limit, hit.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>

#include "support/node.h"

namespace datadist::testing {
namespace {

using namespace llm_datadist;  // the codes, which every line here names
using ::testing::HasSubstr;

TEST(Limits, LinksOfTheServer) {
  Node server(100);
  ASSERT_EQ(server.Start(ServerOptions({{OPTION_MAX_LINKS, "3"}})), LLM_SUCCESS);
  std::vector<std::unique_ptr<Node>> clients;
  for (uint64_t id = 1; id <= 4; ++id) {
    clients.push_back(std::make_unique<Node>(id));
    ASSERT_EQ(clients.back()->Start(ClientOptions()), LLM_SUCCESS);
    EXPECT_EQ(clients.back()->Link(100, server.port()), id <= 3 ? LLM_SUCCESS : LLM_PARAM_INVALID);
  }
  EXPECT_THAT(GetLastErrorText(), HasSubstr("at most 3 (datadist.MaxLinks)"));
  EXPECT_EQ(clients[0]->Link(0, server.port()), LLM_SUCCESS) << "a relink needs no new place: " << GetLastErrorText();
  ASSERT_EQ(clients[1]->Unlink(100, server.port()), LLM_SUCCESS);
  EXPECT_EQ(clients[3]->Link(100, server.port()), LLM_SUCCESS) << GetLastErrorText();
}

TEST(Limits, LinksOfTheClient) {
  Node client(100);
  ASSERT_EQ(client.Start(ClientOptions({{OPTION_MAX_LINKS, "1"}})), LLM_SUCCESS);
  Node first(1);
  Node second(2);
  ASSERT_EQ(first.Start(ServerOptions()), LLM_SUCCESS);
  ASSERT_EQ(second.Start(ServerOptions()), LLM_SUCCESS);
  EXPECT_EQ(client.Link(1, first.port()), LLM_SUCCESS);
  EXPECT_EQ(client.Link(2, second.port()), LLM_PARAM_INVALID);
  EXPECT_EQ(client.Link(0, second.port()), LLM_PARAM_INVALID);
  EXPECT_FALSE(second.Alive(100)) << "a refused link leaves nothing at the peer";
}

// Upstream's documented number, as it comes without any option.
TEST(Limits, FiveHundredAndTwelveLinksByDefault) {
  Node server(1000);
  ASSERT_EQ(server.Start(ServerOptions({{OPTION_TRANSFER_THREADS, "1"}})), LLM_SUCCESS);
  std::vector<std::unique_ptr<Node>> clients;
  for (uint64_t id = 1; id <= 513; ++id) {
    clients.push_back(std::make_unique<Node>(id));
    ASSERT_EQ(clients.back()->Start(ClientOptions({{OPTION_TRANSFER_THREADS, "1"}})), LLM_SUCCESS)
        << id << " " << GetLastErrorText();
    ASSERT_EQ(clients.back()->Link(1000, server.port(), 10000), id <= 512 ? LLM_SUCCESS : LLM_PARAM_INVALID)
        << id << " " << GetLastErrorText();
  }
}

TEST(Limits, AddressesAndBytesPerEndpoint) {
  Node node(1);
  ASSERT_EQ(node.Start(ClientOptions({{OPTION_MAX_ADDRS_PER_CACHE, "4"}, {OPTION_MAX_DEVICE_BYTES, "65536"}})),
            LLM_SUCCESS);
  EXPECT_EQ(node.AddCache(Shape{5, 1, 64}, 1), 0);
  EXPECT_THAT(GetLastErrorText(), HasSubstr("4"));
  EXPECT_NE(node.AddCache(Shape{4, 4, 4096}, 1), 0) << "exactly the limit";
  EXPECT_EQ(node.AddCache(Shape{1, 1, 64}, 1), 0) << "one more";
}

}  // namespace
}  // namespace datadist::testing
