// Every transport behind one interface, with the owner in this process and in another.
#ifndef DATADIST_TESTS_TRANSPORT_SUPPORT_TRANSPORTS_H_
#define DATADIST_TESTS_TRANSPORT_SUPPORT_TRANSPORTS_H_

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "transfer/moves.h"
#include "transport/local/local_data_path.h"
#include "transport_support/initiator.h"
#include "transport_support/owner_process.h"

namespace datadist::test {

struct Setting {
  std::string transport;
  bool second_process;
};

inline std::string NameOf(const testing::TestParamInfo<Setting> &info) {
  return info.param.transport + (info.param.second_process ? "_process" : "_here");
}

inline Deadline Soon() { return Deadline::In(std::chrono::seconds(30)); }

class EachTransport : public testing::TestWithParam<Setting> {
 protected:
  void SetUp() override {
    if (GetParam().second_process) {
      owner_ = std::make_unique<OwnerProcess>();
    } else {
      owner_ = std::make_unique<OwnerHere>();
    }
    path_ = MakePath();
  }

  std::unique_ptr<DataPath> MakePath() {
    if (GetParam().transport == "local") {
      return MakeLocalDataPath(static_cast<OwnerHere &>(*owner_).regions(), 0, pool_);
    }
    return GetParam().transport == "cma" ? ConnectCma(*owner_, &calls_, pool_)
                                         : ConnectTcp(*owner_, 2, pool_, std::chrono::seconds(30));
  }

  bool OwnerChecksPulls() const { return GetParam().transport != "cma"; }

  std::shared_ptr<WorkerPool> pool_ = std::make_shared<WorkerPool>(2);
  std::unique_ptr<Owner> owner_;
  CallsTo calls_{owner_};
  std::unique_ptr<DataPath> path_;
};

inline const auto kAllTransports =
    testing::Values(Setting{"local", false}, Setting{"cma", false},
                    Setting{"cma", true}, Setting{"tcp", false},
                    Setting{"tcp", true});

// The runs of a block list, as the engine makes them.
inline std::vector<Run> BlockRuns(const std::vector<uint64_t> &remote_blocks,
                                  const std::vector<uint64_t> &local_blocks, uint64_t stride) {
  CacheGeometry geometry;
  geometry.stride = stride;
  const auto built =
      BuildRuns(BlockMove{remote_blocks, local_blocks}, geometry, geometry, LocalSide::kDestination, false);
  std::vector<Run> runs;
  for (const ByteRun &run : built.value()) {
    runs.push_back({run.src_offset, run.dst_offset, run.length});
  }
  return runs;
}

}  // namespace datadist::test

#endif  // DATADIST_TESTS_TRANSPORT_SUPPORT_TRANSPORTS_H_
