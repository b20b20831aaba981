// What an owner does with a push over cma: it judges by itself, whatever the peer believes, and knows when it has ended.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "support/member.h"

namespace datadist::testing {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_KV_CACHE_NOT_EXIST;
using llm_datadist::LLM_PARAM_INVALID;
using ::testing::HasSubstr;

constexpr uint64_t kTensorBytes = Member::kShape.num_blocks * Member::kShape.stride;

LinkOptions Cma() {
  LinkOptions options;
  options.forced_transport = "cma";
  return options;
}

class Pushes : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(pusher_.Dial(owner_.Listen()).ok());
    link_ = pusher_.table()->Find(owner_.id());
    ASSERT_NE(link_, nullptr);
    ASSERT_EQ(link_->Report().transport, "cma");
    remote_.cache_id = owner_.AddCache(7);
    remote_.generation = owner_.endpoint()->regions()->Pin(remote_.cache_id).value().cache().generation();
    pin_ = pusher_.endpoint()->regions()->Pin(pusher_.AddCache(8)).value();
  }

  // What the owner says to bytes from `from` of our tensors onto [offset, +length) of its own.
  Status Ask(uint32_t first_tensor, uint32_t tensors, uint64_t offset, uint64_t length, uint64_t from = 0) {
    TransferOp op;
    op.remote = &remote_;
    op.local = &pin_;
    op.remote_first_tensor = first_tensor;
    op.tensor_count = tensors;
    op.runs = {{offset, from, length}};
    return link_->AskToRead(op, Deadline::In(kPatience));
  }

  Member owner_{2, Cma()};
  Member pusher_{1, Cma()};
  std::shared_ptr<Link> link_;
  RemoteCache remote_;
  CachePin pin_;
};

TEST_F(Pushes, AreForBytesWithinTensorsOfTheCache) {
  const auto whole = Ask(0, Member::kShape.num_tensors, 0, kTensorBytes);
  EXPECT_TRUE(whole.ok()) << whole.text();
  EXPECT_EQ(Ask(0, 1, 0, kTensorBytes + 1).code(), LLM_PARAM_INVALID);
  EXPECT_EQ(Ask(0, 1, kTensorBytes, 1).code(), LLM_PARAM_INVALID);
  EXPECT_EQ(Ask(0, 1, UINT64_MAX, 2).code(), LLM_PARAM_INVALID);
  EXPECT_EQ(Ask(0, 1, 0, 2, UINT64_MAX).code(), LLM_PARAM_INVALID);
  EXPECT_EQ(Ask(0, Member::kShape.num_tensors + 1, 0, 1).code(), LLM_PARAM_INVALID);
  EXPECT_EQ(Ask(Member::kShape.num_tensors, 1, 0, 1).code(), LLM_PARAM_INVALID);
  EXPECT_TRUE(Ask(Member::kShape.num_tensors - 1, 1, kTensorBytes - 1, 1).ok());
  EXPECT_TRUE(owner_.CanariesIntact());
}

TEST_F(Pushes, AreForTheCacheThatThePeerKnows) {
  ++remote_.generation;
  EXPECT_EQ(Ask(0, 1, 0, 1).code(), LLM_KV_CACHE_NOT_EXIST);
  --remote_.generation;
  ++remote_.cache_id;
  EXPECT_EQ(Ask(0, 1, 0, 1).code(), LLM_KV_CACHE_NOT_EXIST);
}

// More runs than a request takes.
TEST_F(Pushes, OfManyRunsGoInSeveralRequests) {
  TransferOp op;
  op.remote = &remote_;
  op.local = &pin_;
  op.tensor_count = 1;
  for (uint64_t i = 0; i < kTensorBytes; ++i) {
    op.runs.push_back({i, kTensorBytes - 1 - i, 1});
  }
  ASSERT_GT(op.runs.size(), kMaxPushRuns);
  const Status status = link_->AskToRead(op, Deadline::In(kPatience));
  ASSERT_TRUE(status.ok()) << status.text();
  std::vector<uint8_t> expected = test::PatternOf(Member::kShape, 7);
  const std::vector<uint8_t> source = test::PatternOf(Member::kShape, 8);
  for (uint64_t i = 0; i < kTensorBytes; ++i) {
    expected[i] = source[kTensorBytes - 1 - i];
  }
  EXPECT_EQ(owner_.Bytes(remote_.cache_id), expected);
}

// Once the link has ended here, nothing of the peer's is written any more, whatever it goes on asking for.
TEST_F(Pushes, EndWithTheLink) {
  std::atomic<bool> stop{false};
  // Counted, not looked for in the cache: the next push is writing there.
  std::atomic<int> pushed{0};
  std::thread pushing([&] {
    while (!stop.load()) {
      pushed += Ask(0, Member::kShape.num_tensors, 0, kTensorBytes).ok() ? 1 : 0;
    }
  });
  const bool one_arrived = Eventually([&] { return pushed.load() > 0; });
  const std::shared_ptr<Link> theirs = owner_.table()->Find(pusher_.id());
  theirs->Close("by force");
  theirs->WaitUntilServed();
  const auto pin = owner_.endpoint()->regions()->Pin(remote_.cache_id);
  std::memset(reinterpret_cast<void *>(static_cast<uintptr_t>(pin.value().cache().addrs()[0])), 0x5A, kTensorBytes);
  EXPECT_EQ(Ask(0, 1, 0, 1).code(), LLM_FAILED);
  stop.store(true);
  pushing.join();
  EXPECT_TRUE(one_arrived);
  const std::vector<uint8_t> bytes = owner_.Bytes(remote_.cache_id);
  EXPECT_TRUE(std::all_of(bytes.begin(), bytes.begin() + kTensorBytes, [](uint8_t byte) { return byte == 0x5A; }));
}

}  // namespace
}  // namespace datadist::testing
