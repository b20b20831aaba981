// Rank tables of comms, and what every test of comms expects of them.
#ifndef DATADIST_TESTS_SUPPORT_COMM_MEMBERS_H_
#define DATADIST_TESTS_SUPPORT_COMM_MEMBERS_H_

#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <vector>

#include "support/member.h"

namespace datadist::testing {

constexpr std::chrono::seconds kLong{60};
constexpr std::chrono::seconds kShort{1};

// Cluster ids 1, 2, ... of ranks 0, 1, ...
inline std::vector<CommMember> Members(size_t count) {
  std::vector<CommMember> members;
  for (uint32_t rank = 0; rank < count; ++rank) {
    members.push_back(CommMember{rank + 1, rank, FreeAddress()});
  }
  return members;
}

inline std::vector<CommMember> WithoutAddresses(std::vector<CommMember> members) {
  for (CommMember &member : members) {
    member.address.reset();
  }
  return members;
}

inline int64_t MustLink(Member &member, const std::string &name, const std::vector<CommMember> &members,
                        std::chrono::seconds time = kLong) {
  const Result<int64_t> id = member.comms().Link(name, members, time);
  EXPECT_TRUE(id.ok()) << id.status().text();
  return id.ok() ? id.value() : 0;
}

inline void ExpectOk(Member &member, int64_t comm_id) {
  const CommTable::Report report = member.Settled(comm_id);
  EXPECT_EQ(report.state, CommState::kOk) << "cluster " << member.id() << ": " << report.reason;
}

}  // namespace datadist::testing

#endif  // DATADIST_TESTS_SUPPORT_COMM_MEMBERS_H_
