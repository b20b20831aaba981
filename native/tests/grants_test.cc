// Peers that write only what they were granted, on every transport.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "support/member.h"

namespace datadist::testing {
namespace {

using llm_datadist::LLM_KV_CACHE_NOT_EXIST;
using llm_datadist::LLM_PARAM_INVALID;
using llm_datadist::LLM_SUCCESS;
using ::testing::HasSubstr;

constexpr uint64_t kOwner = 2;
constexpr uint64_t kPusher = 1;
constexpr uint64_t kStride = Member::kShape.stride;
constexpr uint64_t kBlocks = Member::kShape.num_blocks;

RegionLimits With(PeerAccess access) {
  RegionLimits limits;
  limits.peer_access = access;
  return limits;
}

LinkOptions Forced(const char *transport, Verify verify = Verify::kOff) {
  LinkOptions options;
  options.forced_transport = transport;
  options.verify = verify;
  return options;
}

// An owner whose blocks are written by grant, and a peer that pushes.
struct Ends {
  explicit Ends(const LinkOptions &options, PeerAccess access = PeerAccess::kGranted, uint64_t pusher_id = kPusher)
      : owner(kOwner, options, 512, With(access)), pusher(pusher_id, options) {
    EXPECT_TRUE(pusher.Dial(owner.Listen(), kOwner).ok());
    theirs = owner.AddCache(5);
    ours = pusher.AddCache(6);
  }
  Result<uint64_t> Grant(const std::vector<uint64_t> &blocks, uint64_t cluster = kPusher) {
    return owner.endpoint()->regions()->GrantWrites(cluster, {{theirs, blocks}});
  }
  llm_datadist::Status Revoke(uint64_t grant) { return owner.endpoint()->regions()->RevokeWrites(grant).code(); }
  Status Push(uint64_t from, uint64_t to, uint64_t count) { return pusher.Push(kOwner, ours, theirs, from, to, count); }
  // The cache over the same memory, in blocks of `stride` bytes.
  int64_t View(uint64_t stride) {
    const auto pin = owner.endpoint()->regions()->Pin(theirs);
    const datadist::test::CacheShape shape{Member::kShape.num_tensors, kBlocks * kStride / stride, stride};
    return owner.endpoint()->regions()->Register(datadist::test::DescOf(shape), pin.value().cache().addrs()).value();
  }
  // Whether nothing was written, and the refusal left the link as it was.
  void ExpectRefused(const Status &status, const char *why = "only where they were granted to write") {
    EXPECT_EQ(status.code(), LLM_PARAM_INVALID);
    EXPECT_THAT(status.text(), HasSubstr(why));
    EXPECT_EQ(owner.Bytes(theirs), test::PatternOf(Member::kShape, 5));
    EXPECT_TRUE(pusher.Linked(kOwner)) << "a refusal is no fault of the link";
    EXPECT_TRUE(owner.CanariesIntact());
  }

  Member owner;
  Member pusher;
  int64_t theirs = 0;
  int64_t ours = 0;
};

class Grants : public ::testing::TestWithParam<const char *> {};

TEST_P(Grants, AreWhatAPeerWrites) {
  Ends ends(Forced(GetParam()));
  ends.ExpectRefused(ends.Push(0, 2, 1));  // no grant
  const auto grant = ends.Grant({2, 3, 6});
  ASSERT_TRUE(grant.ok()) << grant.status().text();
  ends.ExpectRefused(ends.Push(0, 1, 2));  // half inside, below
  ends.ExpectRefused(ends.Push(0, 3, 2));  // half inside, above
  ends.ExpectRefused(ends.Push(0, 3, 4));  // what lies between two that were granted
  ends.ExpectRefused(ends.Push(0, 0, 1));
  ends.ExpectRefused(ends.Push(0, 7, 1));
  const Status pushed = ends.Push(0, 2, 2);  // two blocks side by side are one piece
  EXPECT_TRUE(pushed.ok()) << pushed.text();
  EXPECT_EQ(ends.owner.Bytes(ends.theirs), Copied(6, 5, 0, 2, 2));
  EXPECT_EQ(ends.Revoke(grant.value()), LLM_SUCCESS);
  EXPECT_EQ(ends.Push(0, 2, 2).code(), LLM_PARAM_INVALID);
  EXPECT_EQ(ends.Revoke(grant.value()), LLM_SUCCESS) << "it is unknown by now";
}

TEST_P(Grants, AreOfOneCluster) {
  Ends ends(Forced(GetParam()));
  ASSERT_TRUE(ends.Grant({0, 1, 2, 3, 4, 5, 6, 7}, kPusher + 1).ok());
  ends.ExpectRefused(ends.Push(0, 2, 1), "cluster 1 holds no live grant");
}

// Two that lie side by side are still two: each ends by itself.
TEST_P(Grants, HoldOnePushEach) {
  Ends ends(Forced(GetParam()));
  const auto first = ends.Grant({2});
  const auto second = ends.Grant({3});
  ends.ExpectRefused(ends.Push(0, 2, 2));
  ASSERT_TRUE(ends.Grant({2, 3}).ok());
  EXPECT_TRUE(ends.Push(0, 2, 2).ok()) << "whichever others there are";
  EXPECT_EQ(ends.Revoke(first.value()), LLM_SUCCESS);
  EXPECT_EQ(ends.Revoke(second.value()), LLM_SUCCESS);
  EXPECT_TRUE(ends.Push(0, 2, 2).ok());
}

TEST_P(Grants, AreOfMemoryWhateverItIsCalled) {
  Ends ends(Forced(GetParam()));
  const int64_t halves = ends.View(kStride / 2);
  const auto fine = ends.owner.endpoint()->regions()->GrantWrites(kPusher, {{halves, {4, 5, 7}}});
  ASSERT_TRUE(fine.ok()) << fine.status().text();
  ends.ExpectRefused(ends.Push(0, 3, 1));  // its first half was not granted
  EXPECT_TRUE(ends.Push(0, 2, 1).ok()) << "halves 4 and 5 are block 2";
  EXPECT_EQ(ends.owner.Bytes(ends.theirs), Copied(6, 5, 0, 2, 1));
  // What two names of it give in one grant is one piece, too.
  ASSERT_TRUE(ends.owner.endpoint()->regions()->GrantWrites(kPusher, {{halves, {8}}, {ends.theirs, {5}}, {halves, {9}}})
                  .ok());
  EXPECT_TRUE(ends.Push(0, 4, 2).ok());
  // And other memory is other memory, in the same place of another cache.
  const int64_t other = ends.owner.AddCache(9);
  EXPECT_EQ(ends.pusher.Push(kOwner, ends.ours, other, 0, 2, 1).code(), LLM_PARAM_INVALID);
  EXPECT_EQ(ends.owner.Bytes(other), test::PatternOf(Member::kShape, 9));
}

// What is granted may be written, and nothing may be read: neither the bytes nor their digests beyond it.
TEST_P(Grants, AreForWriting) {
  Ends ends(Forced(GetParam(), Verify::kFail));
  ASSERT_TRUE(ends.Grant({2, 3}).ok());
  const Status pushed = ends.Push(0, 2, 2);
  EXPECT_TRUE(pushed.ok()) << pushed.text();
  EXPECT_EQ(ends.pusher.table()->Find(kOwner)->Report().blocks_verified, 2U) << "and digests say that it arrived";
  const Status pulled = ends.pusher.Pull(kOwner, ends.theirs, ends.ours, 2, 0, 1);
  EXPECT_EQ(pulled.code(), LLM_PARAM_INVALID) << pulled.text();
  EXPECT_THAT(pulled.text(), HasSubstr("datadist.PeerAccess"));
  EXPECT_EQ(ends.pusher.Bytes(ends.ours), test::PatternOf(Member::kShape, 6));
  EXPECT_TRUE(ends.pusher.Linked(kOwner)) << "a refusal is no fault of the link";
}

TEST_P(Grants, MayComeWithReading) {
  Ends ends(Forced(GetParam(), Verify::kFail), PeerAccess::kReadGranted);
  ends.ExpectRefused(ends.Push(0, 2, 1));
  EXPECT_TRUE(ends.pusher.Pull(kOwner, ends.theirs, ends.ours, 2, 0, 1).ok());
  ASSERT_TRUE(ends.Grant({2}).ok());
  EXPECT_TRUE(ends.Push(1, 2, 1).ok());
}

// Of one cache, where others are written as ever.
TEST_P(Grants, MayBeOfOneCache) {
  Ends ends(Forced(GetParam()), PeerAccess::kReadWrite);
  const int64_t guarded = ends.owner.AddCache(5, {PeerAccess::kGranted, {}});
  EXPECT_EQ(ends.pusher.Push(kOwner, ends.ours, guarded, 0, 2, 1).code(), LLM_PARAM_INVALID);
  EXPECT_EQ(ends.pusher.Pull(kOwner, guarded, ends.ours, 2, 0, 1).code(), LLM_PARAM_INVALID);
  EXPECT_EQ(ends.owner.Bytes(guarded), test::PatternOf(Member::kShape, 5));
  EXPECT_TRUE(ends.Push(0, 2, 1).ok());
  ASSERT_TRUE(ends.owner.endpoint()->regions()->GrantWrites(kPusher, {{guarded, {2}}}).ok());
  EXPECT_TRUE(ends.pusher.Push(kOwner, ends.ours, guarded, 0, 2, 1).ok());
  EXPECT_EQ(ends.owner.Bytes(guarded), Copied(6, 5, 0, 2, 1));
}

// A link that was made anew writes under the grants of its cluster; they are not the old link's.
TEST_P(Grants, OutliveALinkUntilTheyAreRevoked) {
  Ends ends(Forced(GetParam()));
  const auto grant = ends.Grant({2});
  ASSERT_TRUE(ends.Push(0, 2, 1).ok());
  ASSERT_TRUE(ends.pusher.Unlink(kOwner).ok());
  ASSERT_TRUE(ends.pusher.Dial(ends.owner.Listen(), kOwner).ok());
  EXPECT_TRUE(ends.Push(0, 2, 1).ok());
  EXPECT_EQ(ends.Revoke(grant.value()), LLM_SUCCESS);
  EXPECT_EQ(ends.Push(0, 2, 1).code(), LLM_PARAM_INVALID);
}

// A PUSH says what it likes: over cma the owner takes the bytes by itself, and judges what it is asked for.
TEST(GrantedPushes, WhoeverAsksForMoreThanThereIsIsRefused) {
  Ends ends(Forced("cma"));
  ASSERT_TRUE(ends.Grant({0, 1, 2, 3, 4, 5, 6, 7}).ok());
  const auto link = ends.pusher.table()->Find(kOwner);
  const auto source = ends.pusher.endpoint()->regions()->Pin(ends.ours);
  RemoteCache remote;
  remote.cache_id = ends.theirs;
  remote.generation = ends.owner.endpoint()->regions()->Pin(ends.theirs).value().cache().generation();
  const auto ask = [&](uint32_t first_tensor, uint32_t tensors, const std::vector<Span> &onto) {
    TransferOp op;
    op.remote = &remote;
    op.local = &source.value();
    op.remote_first_tensor = first_tensor;
    op.tensor_count = tensors;
    for (const Span &span : onto) {
      op.runs.push_back({span.offset, 0, span.length});
    }
    return link->AskToRead(op, Deadline::In(kPatience)).code();
  };
  constexpr uint64_t kBytes = kBlocks * kStride;
  for (const std::vector<Span> &hostile :
       {std::vector<Span>{{kBytes, 1}}, {{0, kBytes + 1}}, {{UINT64_MAX, 2}}, {{kStride, UINT64_MAX}},
        {{1, UINT64_MAX}}, {{0, kStride}, {UINT64_MAX - kStride + 1, 2 * kStride}}}) {
    EXPECT_EQ(ask(0, 1, hostile), LLM_PARAM_INVALID) << hostile.back().offset;
  }
  EXPECT_EQ(ask(Member::kShape.num_tensors, 1, {{0, 1}}), LLM_PARAM_INVALID);
  EXPECT_EQ(ask(1, Member::kShape.num_tensors, {{0, 1}}), LLM_PARAM_INVALID);
  EXPECT_EQ(ask(UINT32_MAX, 2, {{0, 1}}), LLM_PARAM_INVALID);
  EXPECT_EQ(ask(UINT32_MAX, UINT32_MAX, {{0, 1}}), LLM_PARAM_INVALID);
  EXPECT_EQ(ends.owner.Bytes(ends.theirs), test::PatternOf(Member::kShape, 5));
  EXPECT_EQ(ask(0, 1, {{0, kStride}}), LLM_SUCCESS) << "the link goes on";
  EXPECT_TRUE(ends.owner.CanariesIntact());
}

// Who may not read a cache is not told where it lies: over cma nobody else would keep it from reading.
TEST(GrantedPushes, AreToldNoAddresses) {
  Ends ends(Forced("cma"));
  const int64_t guarded = ends.owner.AddCache(7, {PeerAccess::kGranted, {}});
  std::vector<size_t> told;
  for (const int64_t cache : {ends.theirs, guarded}) {
    const auto plan = [&](const RemoteTarget &target) -> Result<TransferOp> {
      told.push_back(target.cache.blob.size());
      return Status(LLM_PARAM_INVALID, "only asking");
    };
    EXPECT_FALSE(ends.pusher.table()
                     ->Find(kOwner)
                     ->Transfer(TransferDirection::kPush, {{CacheRef::Id(cache), plan}}, Deadline::In(kPatience))
                     .ok());
  }
  EXPECT_EQ(told, (std::vector<size_t>{0, 0}));
}

INSTANTIATE_TEST_SUITE_P(Transports, Grants, ::testing::Values("local", "cma", "tcp"),
                         [](const auto &kind) { return std::string(kind.param); });

TEST(GrantedBlocks, AreThoseOfTheCache) {
  Member owner(kOwner, {}, 512, With(PeerAccess::kGranted));
  RegionTable &regions = *owner.endpoint()->regions();
  const int64_t cache = owner.AddCache(1);
  const auto refusal = [&](const std::vector<WritableBlocks> &blocks) {
    return regions.GrantWrites(kPusher, blocks).status();
  };
  EXPECT_EQ(refusal({{cache + 1, {0}}}).code(), LLM_KV_CACHE_NOT_EXIST);
  EXPECT_EQ(refusal({{cache, {0}}, {cache, {7, kBlocks}}}).text(),
            "blocks[1]: blocks of cache 1[1]: 8, allowed: 0..7");
  EXPECT_EQ(refusal({{cache, {UINT64_MAX}}}).code(), LLM_PARAM_INVALID);
  EXPECT_THAT(refusal({{cache, {}}}).text(), HasSubstr("empty"));
  EXPECT_THAT(refusal({}).text(), HasSubstr("empty"));
  for (const PeerAccess access : {PeerAccess::kNone, PeerAccess::kRead}) {
    EXPECT_THAT(refusal({{owner.AddCache(1, {access, {}}), {0}}}).text(), HasSubstr("peers may not write into"));
  }
  EXPECT_THAT(refusal({{owner.AddCache(1, {PeerAccess::kReadWrite, {9}}), {0}}}).text(),
              HasSubstr("is not for cluster 1"));
  Member open(kOwner);
  const Status pointless = open.endpoint()->regions()->GrantWrites(kPusher, {{open.AddCache(1), {0}}}).status();
  EXPECT_THAT(pointless.text(), HasSubstr("datadist.PeerAccess, allowed: 'granted', 'read_granted'"));
}

}  // namespace
}  // namespace datadist::testing
