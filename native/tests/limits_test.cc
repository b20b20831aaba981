// Every limit, hit.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <memory>

#include "support/node.h"

namespace datadist::testing {
namespace {

using namespace llm_datadist;  // the codes, which every line here names
using ::testing::HasSubstr;

// With it, says the documentation, links are not limited.
constexpr char kCommRes13[] = R"({"version": "1.3"})";

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

// Upstream's documented number, as it comes without any option; and the case in which there is none.
TEST(Limits, FiveHundredAndTwelveLinksByDefault) {
  Node server(1000);
  ASSERT_EQ(server.Start(ServerOptions({{OPTION_TRANSFER_THREADS, "1"}})), LLM_SUCCESS);
  Node unlimited(1001);
  ASSERT_EQ(unlimited.Start(ServerOptions({{OPTION_TRANSFER_THREADS, "1"}, {OPTION_LOCAL_COMM_RES, kCommRes13}})),
            LLM_SUCCESS);
  std::vector<std::unique_ptr<Node>> clients;
  for (uint64_t id = 1; id <= 513; ++id) {
    clients.push_back(std::make_unique<Node>(id));
    ASSERT_EQ(clients.back()->Start(ClientOptions({{OPTION_TRANSFER_THREADS, "1"}})), LLM_SUCCESS)
        << id << " " << GetLastErrorText();
    ASSERT_EQ(clients.back()->Link(1000, server.port(), 10000), id <= 512 ? LLM_SUCCESS : LLM_PARAM_INVALID)
        << id << " " << GetLastErrorText();
    ASSERT_EQ(clients.back()->Link(1001, unlimited.port(), 10000), LLM_SUCCESS) << id << " " << GetLastErrorText();
  }
}

TEST(Limits, OptionLimitsLinksAlsoWithCommResOfVersion13) {
  Node server(100);
  ASSERT_EQ(server.Start(ServerOptions({{OPTION_MAX_LINKS, "1"}, {OPTION_LOCAL_COMM_RES, kCommRes13}})), LLM_SUCCESS);
  Node first(1);
  Node second(2);
  ASSERT_EQ(first.Start(ClientOptions()), LLM_SUCCESS);
  ASSERT_EQ(second.Start(ClientOptions()), LLM_SUCCESS);
  EXPECT_EQ(first.Link(100, server.port()), LLM_SUCCESS);
  EXPECT_EQ(second.Link(100, server.port()), LLM_PARAM_INVALID);
  EXPECT_EQ(first.Unlink(100, server.port()), LLM_SUCCESS);
  EXPECT_EQ(second.Link(100, server.port()), LLM_SUCCESS) << "only live links count";
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

// Address space that nobody touches: registering memory neither reads nor writes it.
class Reserved {
 public:
  explicit Reserved(uint64_t bytes)
      : bytes_(bytes),
        start_(::mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}
  ~Reserved() { ::munmap(start_, bytes_); }
  Reserved(const Reserved &) = delete;
  Reserved &operator=(const Reserved &) = delete;
  uint64_t address() const { return reinterpret_cast<uint64_t>(start_); }

 private:
  const size_t bytes_;
  void *const start_;
};

Status RegisterBytes(Node &node, CachePlacement placement, uint64_t address, uint64_t bytes, uint32_t tensors = 1) {
  CacheDesc desc{};
  desc.placement = placement;
  desc.num_tensors = tensors;
  desc.data_type = DT_UINT8;
  desc.shape = {1, static_cast<int64_t>(bytes)};
  int64_t id = 0;
  return node.datadist().RegisterKvCache(desc, std::vector<uint64_t>(tensors, address), {}, id);
}

struct MemoryLimit {
  CachePlacement placement;
  uint64_t bytes;
  const char *option;
};

class MemoryLimits : public ::testing::TestWithParam<MemoryLimit> {};

// The documented numbers, as they come without any option, to the byte; and that an option raises them.
TEST_P(MemoryLimits, HoldByDefaultAndCanBeRaised) {
  const MemoryLimit &limit = GetParam();
  const Reserved memory(limit.bytes);
  Node node(1);
  ASSERT_EQ(node.Start(ClientOptions()), LLM_SUCCESS);
  EXPECT_EQ(RegisterBytes(node, limit.placement, memory.address(), limit.bytes + 1), LLM_PARAM_INVALID);
  EXPECT_THAT(GetLastErrorText(), HasSubstr(limit.option));
  ASSERT_EQ(RegisterBytes(node, limit.placement, memory.address(), limit.bytes), LLM_SUCCESS) << GetLastErrorText();
  EXPECT_EQ(RegisterBytes(node, limit.placement, memory.address(), 1), LLM_PARAM_INVALID);
  ASSERT_EQ(node.datadist().UnregisterKvCache(1), LLM_SUCCESS);
  EXPECT_EQ(RegisterBytes(node, limit.placement, memory.address(), 1), LLM_SUCCESS) << "what is given back counts";

  Node raised(2);
  ASSERT_EQ(raised.Start(ClientOptions({{limit.option, std::to_string(limit.bytes + 1)}})), LLM_SUCCESS);
  EXPECT_EQ(RegisterBytes(raised, limit.placement, memory.address(), limit.bytes + 1), LLM_SUCCESS);
}

INSTANTIATE_TEST_SUITE_P(Placements, MemoryLimits,
                         ::testing::Values(MemoryLimit{CachePlacement::kDevice, 50ULL << 30, OPTION_MAX_DEVICE_BYTES},
                                           MemoryLimit{CachePlacement::kHost, 20ULL << 30, OPTION_MAX_HOST_BYTES}));

TEST(Limits, TwoHundredAndFortyAddressesByDefault) {
  Node node(1);
  ASSERT_EQ(node.Start(ClientOptions()), LLM_SUCCESS);
  const Reserved memory(4096);
  EXPECT_EQ(RegisterBytes(node, CachePlacement::kDevice, memory.address(), 1, 241), LLM_PARAM_INVALID);
  EXPECT_THAT(GetLastErrorText(), HasSubstr(OPTION_MAX_ADDRS_PER_CACHE));
  EXPECT_EQ(RegisterBytes(node, CachePlacement::kDevice, memory.address(), 1, 240), LLM_SUCCESS);
  EXPECT_EQ(RegisterBytes(node, CachePlacement::kDevice, memory.address(), 1, 240), LLM_SUCCESS) << "per call";
  Node raised(2);
  ASSERT_EQ(raised.Start(ClientOptions({{OPTION_MAX_ADDRS_PER_CACHE, "241"}})), LLM_SUCCESS);
  EXPECT_EQ(RegisterBytes(raised, CachePlacement::kDevice, memory.address(), 1, 241), LLM_SUCCESS);
  Node total(3);
  ASSERT_EQ(total.Start(ClientOptions({{OPTION_MAX_REGISTERED_ADDRS, "300"}})), LLM_SUCCESS);
  EXPECT_EQ(RegisterBytes(total, CachePlacement::kDevice, memory.address(), 1, 240), LLM_SUCCESS);
  EXPECT_EQ(RegisterBytes(total, CachePlacement::kDevice, memory.address(), 1, 61), LLM_PARAM_INVALID);
  EXPECT_THAT(GetLastErrorText(), HasSubstr(OPTION_MAX_REGISTERED_ADDRS));
}

}  // namespace
}  // namespace datadist::testing
