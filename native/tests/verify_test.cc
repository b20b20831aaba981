// Option datadist.Verify: wrong bytes are found, wherever they got wrong, and right ones pass.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "memory/digests.h"
#include "support/chopping_proxy.h"
#include "support/node.h"

namespace datadist::testing {
namespace {

using ::testing::HasSubstr;
using llm_datadist::LLM_KV_CACHE_NOT_EXIST;
using llm_datadist::LLM_SUCCESS;
using llm_datadist::Status;

constexpr Shape kShape{4, 16, 65536};
const Blocks kAll = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
const Blocks kReversed = {15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0};

TextOptions Options(const std::string &transport, const std::string &verify) {
  return {{llm_datadist::OPTION_TRANSPORT, transport},
          {llm_datadist::OPTION_VERIFY, verify},
          {llm_datadist::OPTION_INSECURE, "1"}};  // a proxy comes over TCP
}

class Verified : public ::testing::TestWithParam<const char *> {};

TEST_P(Verified, RightBytesPass) {
  Node server(2);
  Node client(1);
  ASSERT_EQ(server.Start(ServerOptions(Options(GetParam(), "off"))), LLM_SUCCESS);
  ASSERT_EQ(client.Start(ClientOptions(Options(GetParam(), "fail"))), LLM_SUCCESS);
  const int64_t theirs = server.AddCache(kShape, 2);
  const int64_t mine = client.AddCache(kShape, 1);
  ASSERT_EQ(client.Link(2, server.port()), LLM_SUCCESS) << llm_datadist::GetLastErrorText();
  ASSERT_EQ(client.Pull(2, theirs, mine, kReversed, kAll), LLM_SUCCESS) << llm_datadist::GetLastErrorText();
  EXPECT_EQ(client.Report(2).blocks_verified, kAll.size());
  EXPECT_EQ(client.Push(mine, 2, theirs, kAll, kReversed), LLM_SUCCESS) << llm_datadist::GetLastErrorText();
  EXPECT_GE(client.Report(2).blocks_verified, 2 * kAll.size());
  EXPECT_EQ(client.Pull(2, theirs, mine, {0, 1}, {3, 3}), LLM_SUCCESS) << "what is written twice is not checked";
  EXPECT_EQ(client.Report(2).blocks_wrong, 0U);
}

INSTANTIATE_TEST_SUITE_P(Transports, Verified, ::testing::Values("local", "cma", "tcp"));

struct Outcome {
  const char *verify;
  Status code;
  uint64_t wrong;
};

class VerifyOfDamage : public ::testing::TestWithParam<Outcome> {};

// One bit of some megabytes, flipped on the wire.
TEST_P(VerifyOfDamage, SeesOneBit) {
  Node server(2);
  Node client(1);
  ASSERT_EQ(server.Start(ServerOptions(Options("tcp", "off"))), LLM_SUCCESS);
  ASSERT_EQ(client.Start(ClientOptions(Options("tcp", GetParam().verify))), LLM_SUCCESS);
  const int64_t theirs = server.AddCache(kShape, 2);
  const int64_t mine = client.AddCache(kShape, 1);
  ChoppingProxy proxy(server.port(), 2'000'000, ChoppingProxy::Fault::kFlip);
  ASSERT_EQ(client.Link(2, proxy.port()), LLM_SUCCESS) << llm_datadist::GetLastErrorText();
  EXPECT_EQ(client.Pull(2, theirs, mine, kAll, kAll), GetParam().code) << llm_datadist::GetLastErrorText();
  ASSERT_TRUE(proxy.flipped());
  EXPECT_NE(client.Contents(mine), server.Contents(theirs)) << "or nothing was to be found";
  EXPECT_EQ(client.Report(2).blocks_wrong, GetParam().wrong);
  EXPECT_TRUE(client.Alive(2)) << "one bad block costs nobody else's transfers";
}

INSTANTIATE_TEST_SUITE_P(Modes, VerifyOfDamage,
                         ::testing::Values(Outcome{"off", LLM_SUCCESS, 0}, Outcome{"log", LLM_SUCCESS, 1},
                                           Outcome{"fail", LLM_KV_CACHE_NOT_EXIST, 1}));

TEST(Verify, TestsItsDetector) { EXPECT_TRUE(CheckDetector().ok()); }

TEST(Verify, RefusesOtherModes) {
  EXPECT_EQ(Node(1).Start(ClientOptions({{llm_datadist::OPTION_VERIFY, "maybe"}})), llm_datadist::LLM_PARAM_INVALID);
  EXPECT_THAT(llm_datadist::GetLastErrorText(), HasSubstr("'off', 'log', 'fail'"));
}

}  // namespace
}  // namespace datadist::testing
