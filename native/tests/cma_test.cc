// Whose memory it is, is proven: the probe, the witness of every transfer, the errors of the kernel in words.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <set>
#include <string>

#include "transport/cma/process_memory.h"
#include "transport_support/initiator.h"
#include "transport_support/owner_process.h"

namespace datadist::test {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_KV_CACHE_NOT_EXIST;
using llm_datadist::LLM_LINK_FAILED;
using testing::Test;

constexpr Challenge kChallenge{7, 7, 7, 7, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};

Deadline Soon() { return Deadline::In(std::chrono::seconds(30)); }

bool Contains(const Status &status, const std::string &text) { return status.text().find(text) != std::string::npos; }

// ---- probe ----

TEST(ProbeSlot, HoldsTheChallengeAndIsWiped) {
  uint64_t address = 0;
  {
    ProbeSlot slot;
    slot.Set(kChallenge);
    address = slot.address();
    EXPECT_EQ(*reinterpret_cast<const Challenge *>(address), kChallenge);
  }
  EXPECT_EQ(*reinterpret_cast<const Challenge *>(address), Challenge{}) << "its memory stays mapped, and empty";
}

TEST(ProbeSlot, LiveSlotsAreDistinctAndFreedOnesAreUsedAgain) {
  std::set<uint64_t> first;
  for (int round = 0; round < 2; ++round) {
    std::vector<std::unique_ptr<ProbeSlot>> slots;
    std::set<uint64_t> addresses;
    for (int i = 0; i < 1000; ++i) {
      slots.push_back(std::make_unique<ProbeSlot>());
      addresses.insert(slots.back()->address());
    }
    EXPECT_EQ(addresses.size(), slots.size());
    if (round == 0) {
      first = addresses;
    } else {
      EXPECT_EQ(addresses, first) << "links that come and go must not use up memory";
    }
  }
}

TEST(ProbeCma, AcceptsAPeerThatHoldsOurChallenge) {
  OwnerProcess owner;
  const Status status = ProbeCma(owner.OfferSlot(kChallenge));
  EXPECT_TRUE(status.ok()) << status.text();
}

TEST(ProbeCma, SaysWhyNot) {
  OwnerProcess owner;
  const CmaPeer good = owner.OfferSlot(kChallenge);
  struct Case {
    const char *reason;
    void (*spoil)(CmaPeer &peer);
  };
  const Case cases[] = {
      {"another host", [](CmaPeer &peer) { peer.host.boot_id = "other"; }},
      {"another host", [](CmaPeer &peer) { peer.host.boot_id.clear(); }},
      {"pid namespace", [](CmaPeer &peer) { ++peer.host.pid_namespace; }},
      {"no memory to probe", [](CmaPeer &peer) { peer.host.pid = 0; }},
      {"no memory to probe", [](CmaPeer &peer) { peer.host.pid = -1; }},
      {"no memory to probe", [](CmaPeer &peer) { peer.slot_addr = 0; }},
      {"challenge", [](CmaPeer &peer) { peer.challenge[0] ^= 1; }},
      {"not mapped", [](CmaPeer &peer) { peer.slot_addr = 4096; }},
      {"not mapped", [](CmaPeer &peer) { peer.slot_addr = ~uint64_t{0}; }},
  };
  for (const Case &test : cases) {
    CmaPeer peer = good;
    test.spoil(peer);
    const Status status = ProbeCma(peer);
    EXPECT_EQ(status.code(), LLM_LINK_FAILED);
    EXPECT_TRUE(Contains(status, test.reason)) << status.text();
  }
  owner.Kill();
  EXPECT_TRUE(Contains(ProbeCma(good), "is gone")) << ProbeCma(good).text();
}

TEST(ProbeCma, SeesADroppedSlot) {
  OwnerProcess owner;
  const CmaPeer peer = owner.OfferSlot(kChallenge);
  owner.DropSlot();
  EXPECT_TRUE(Contains(ProbeCma(peer), "challenge")) << ProbeCma(peer).text();
}

// ---- witness ----

class CmaWitness : public Test {
 protected:
  TransferOp Op(const RemoteCache &remote) { return {&remote, &local_.pin(), 0, 0, 2, {{0, 0, 4 * 64}}}; }
  std::unique_ptr<DataPath> PathTo(const CmaPeer &peer) { return MakeCmaDataPath(peer, &calls_, pool_); }

  const CacheShape shape_{2, 4, 64};
  std::unique_ptr<Owner> owner_ = std::make_unique<OwnerProcess>();
  GrantsOf calls_{owner_};
  std::shared_ptr<WorkerPool> pool_ = std::make_shared<WorkerPool>(1);
  RemoteCache remote_ = owner_->AddCache(shape_, 1);
  CmaPeer peer_ = owner_->OfferSlot(kChallenge);
  LocalCache local_{shape_, 2};
};

TEST_F(CmaWitness, DroppedLinkEndsTransfersBeforeAByteIsWritten) {
  const auto path = PathTo(peer_);
  ASSERT_TRUE(path->Pull(Op(remote_), Soon()).ok());
  owner_->DropSlot();
  EXPECT_EQ(path->Pull(Op(remote_), Soon()).code(), LLM_FAILED);
  EXPECT_EQ(path->Push(Op(remote_), Soon()).code(), LLM_FAILED);
  EXPECT_EQ(owner_->Bytes(remote_.cache_id), PatternOf(shape_, 1));
}

// A pid that now belongs to somebody else: all is there and readable, but for our challenge.
TEST_F(CmaWitness, AnotherProcessUnderThePidIsNoticed) {
  OwnerProcess stranger;
  const RemoteCache theirs = stranger.AddCache(shape_, 3);
  CmaPeer wrong = stranger.OfferSlot(Challenge{9});
  wrong.challenge = kChallenge;
  EXPECT_EQ(PathTo(wrong)->Pull(Op(theirs), Soon()).code(), LLM_FAILED);
  EXPECT_EQ(PathTo(wrong)->Push(Op(theirs), Soon()).code(), LLM_FAILED);
  EXPECT_EQ(stranger.Bytes(theirs.cache_id), PatternOf(shape_, 3)) << "nothing may be written into it";
}

TEST_F(CmaWitness, StampOfAnotherGenerationIsAMissingCache) {
  RemoteCache stale = remote_;
  stale.stamp_addr = owner_->AddCache(shape_, 4).stamp_addr;  // another cache's stamp: alive, but not ours
  EXPECT_EQ(PathTo(peer_)->Pull(Op(stale), Soon()).code(), LLM_KV_CACHE_NOT_EXIST);
}

TEST_F(CmaWitness, UnmappedMemoryIsAFailureInWords) {
  RemoteCache wild = remote_;
  wild.tensor_addrs.assign(2, 4096);
  const Status status = PathTo(peer_)->Pull(Op(wild), Soon());
  EXPECT_EQ(status.code(), LLM_FAILED);
  EXPECT_TRUE(Contains(status, "not mapped")) << status.text();
}

TEST_F(CmaWitness, MissingAddressesAreRefused) {
  RemoteCache no_addresses = remote_;
  no_addresses.tensor_addrs.pop_back();
  EXPECT_EQ(PathTo(peer_)->Pull(Op(no_addresses), Soon()).code(), LLM_FAILED);
  RemoteCache no_stamp = remote_;
  no_stamp.stamp_addr = 0;
  EXPECT_EQ(PathTo(peer_)->Push(Op(no_stamp), Soon()).code(), LLM_FAILED);
}

// Grants are returned however a push ends; GrantsOf fails the test on a grant returned twice or unknown.
TEST_F(CmaWitness, EveryGrantIsReleased) {
  class Counting final : public PeerCalls {
   public:
    explicit Counting(PeerCalls *calls) : calls_(calls) {}
    Result<uint64_t> AcquireWrite(const TransferOp &op, Deadline deadline) override {
      auto grant = calls_->AcquireWrite(op, deadline);
      held += grant.ok() ? 1 : 0;
      return grant;
    }
    void ReleaseWrite(uint64_t grant) override {
      --held;
      calls_->ReleaseWrite(grant);
    }
    int held = 0;

   private:
    PeerCalls *calls_;
  } counting(&calls_);
  const auto path = MakeCmaDataPath(peer_, &counting, pool_);
  EXPECT_TRUE(path->Push(Op(remote_), Soon()).ok());
  EXPECT_EQ(path->Push(Op(remote_), Deadline::In(std::chrono::milliseconds(0))).code(), llm_datadist::LLM_TIMEOUT);
  RemoteCache wild = remote_;
  wild.tensor_addrs.assign(2, 4096);
  EXPECT_EQ(path->Push(Op(wild), Soon()).code(), LLM_FAILED);
  owner_->DropSlot();
  EXPECT_EQ(path->Push(Op(remote_), Soon()).code(), LLM_FAILED);
  EXPECT_EQ(counting.held, 0);
}

// ---- batches ----

// The kernel stops at an unmapped page after the bytes before it; the batch must say so and not spin.
TEST(IovecBatch, StopsAtAHoleInTheMiddle) {
  const size_t page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  auto *memory = static_cast<uint8_t *>(
      ::mmap(nullptr, 3 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  ASSERT_NE(memory, MAP_FAILED);
  memory[0] = 42;
  ASSERT_EQ(::munmap(memory + page, page), 0);
  std::vector<uint8_t> out(3 * page);
  IovecBatch batch;
  batch.Add(reinterpret_cast<uintptr_t>(memory), out.data(), 3 * page);
  EXPECT_EQ(batch.Move(::getpid(), VmDirection::kRead).code(), LLM_FAILED);
  EXPECT_EQ(out[0], 42);
  EXPECT_TRUE(batch.Empty());
  ::munmap(memory, page);
  ::munmap(memory + 2 * page, page);
}

TEST(IovecBatch, MergesEachSideByItself) {
  std::vector<uint8_t> from(1 << 16);
  std::vector<uint8_t> to(1 << 16);
  for (size_t i = 0; i < from.size(); ++i) {
    from[i] = static_cast<uint8_t>(i * 7);
  }
  IovecBatch batch;
  for (size_t i = 0; i < 4096; ++i) {  // far more pairs than one call takes, were they not merged
    ASSERT_FALSE(batch.Full());
    batch.Add(reinterpret_cast<uintptr_t>(&from[i * 16]), &to[i * 16], 16);
  }
  ASSERT_TRUE(batch.Move(::getpid(), VmDirection::kRead).ok());
  EXPECT_EQ(to, from);
}

}  // namespace
}  // namespace datadist::test

int main(int argc, char **argv) { return datadist::test::TestMain(argc, argv); }
