// What an owner lets a peer write that writes by itself (cma): the owner judges, whatever the peer believes it knows.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "support/member.h"

namespace datadist::testing {
namespace {

using llm_datadist::LLM_KV_CACHE_NOT_EXIST;
using llm_datadist::LLM_PARAM_INVALID;

constexpr uint64_t kTensorBytes = Member::kShape.num_blocks * Member::kShape.stride;

LinkOptions Cma() {
  LinkOptions options;
  options.forced_transport = TransportKind::kCma;
  return options;
}

class WriteGrants : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(writer_.Dial(owner_.Listen()).ok());
    link_ = writer_.table()->Find(owner_.id());
    ASSERT_NE(link_, nullptr);
    ASSERT_EQ(link_->Report().transport, "cma");
    remote_.cache_id = owner_.AddCache(7);
    remote_.generation = owner_.endpoint()->regions()->Pin(remote_.cache_id).value().cache().generation();
  }

  // What the owner says to a write of [offset, +length) of the tensors.
  Result<uint64_t> Ask(uint32_t first_tensor, uint32_t tensors, uint64_t offset, uint64_t length) {
    TransferOp op;
    op.remote = &remote_;
    op.remote_first_tensor = first_tensor;
    op.tensor_count = tensors;
    op.runs = {{offset, 0, length}};
    return link_->AcquireWrite(op, Deadline::In(kPatience));
  }

  Member owner_{2, Cma()};
  Member writer_{1, Cma()};
  std::shared_ptr<Link> link_;
  RemoteCache remote_;
};

TEST_F(WriteGrants, AreForBytesWithinTensorsOfTheCache) {
  const auto whole = Ask(0, Member::kShape.num_tensors, 0, kTensorBytes);
  EXPECT_TRUE(whole.ok()) << whole.status().text();
  EXPECT_EQ(Ask(0, 1, 0, kTensorBytes + 1).status().code(), LLM_PARAM_INVALID);
  EXPECT_EQ(Ask(0, 1, kTensorBytes, 1).status().code(), LLM_PARAM_INVALID);
  EXPECT_EQ(Ask(0, 1, UINT64_MAX, 2).status().code(), LLM_PARAM_INVALID);
  EXPECT_EQ(Ask(0, Member::kShape.num_tensors + 1, 0, 1).status().code(), LLM_PARAM_INVALID);
  EXPECT_EQ(Ask(Member::kShape.num_tensors, 1, 0, 1).status().code(), LLM_PARAM_INVALID);
  EXPECT_TRUE(Ask(Member::kShape.num_tensors - 1, 1, kTensorBytes - 1, 1).ok());
}

TEST_F(WriteGrants, AreForTheCacheThatThePeerKnows) {
  ++remote_.generation;
  EXPECT_EQ(Ask(0, 1, 0, 1).status().code(), LLM_KV_CACHE_NOT_EXIST);
  --remote_.generation;
  ++remote_.cache_id;
  EXPECT_EQ(Ask(0, 1, 0, 1).status().code(), LLM_KV_CACHE_NOT_EXIST);
}

TEST_F(WriteGrants, AreFewAtATime) {
  std::vector<uint64_t> grants;
  Result<uint64_t> grant = Ask(0, 1, 0, 1);
  for (; grant.ok() && grants.size() < 100; grant = Ask(0, 1, 0, 1)) {
    grants.push_back(grant.value());
  }
  EXPECT_EQ(grants.size(), 16U);
  EXPECT_THAT(grant.status().text(), ::testing::HasSubstr("at most 16"));
  link_->ReleaseWrite(grants.front());
  EXPECT_TRUE(Ask(0, 1, 0, 1).ok()) << "one of them was given back";
}

}  // namespace
}  // namespace datadist::testing
