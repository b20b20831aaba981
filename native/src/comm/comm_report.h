// What became of a comm, as its callers see it. See comm_table.h.
#ifndef DATADIST_COMM_COMM_REPORT_H_
#define DATADIST_COMM_COMM_REPORT_H_

#include <cstdint>
#include <string>

namespace datadist {

enum class CommState : uint8_t { kOk = 0, kPreparing = 1, kFailed = 2 };

struct CommReport {
  CommState state = CommState::kPreparing;
  std::string reason;  // why it failed
};

}  // namespace datadist

#endif  // DATADIST_COMM_COMM_REPORT_H_
