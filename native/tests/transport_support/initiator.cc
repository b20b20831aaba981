#include "transport_support/initiator.h"

#include <gtest/gtest.h>

#include <utility>

namespace datadist::test {

LocalCache::LocalCache(const CacheShape &shape, uint64_t seed) : arena_(shape) {
  arena_.Fill(PatternOf(shape, seed));
  const auto id = regions_->Register(DescOf(shape), arena_.Addrs());
  EXPECT_TRUE(id.ok());
  pin_ = regions_->Pin(id.value()).value();
}

std::unique_ptr<DataPath> ConnectCma(Owner &owner, PeerCalls *calls, std::shared_ptr<WorkerPool> pool) {
  const Challenge challenge{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
  CmaPeer peer = owner.OfferSlot(challenge);
  const Status probed = ProbeCma(peer);
  EXPECT_TRUE(probed.ok()) << probed.text();
  return MakeCmaDataPath(std::move(peer), calls, std::move(pool));
}

std::unique_ptr<DataPath> ConnectTcp(Owner &owner, size_t streams, std::shared_ptr<WorkerPool> pool,
                                     std::chrono::milliseconds max_request) {
  const uint16_t port = owner.Listen();
  std::vector<Fd> connections;
  for (size_t i = 0; i < streams; ++i) {
    connections.push_back(Dial(port));
  }
  owner.Serve(streams, max_request);
  return MakeTcpDataPath(std::move(connections), std::move(pool));
}

}  // namespace datadist::test
