#include "transport_support/initiator.h"

#include <gtest/gtest.h>

#include <utility>

#include "transport/tcp/tcp_data_path.h"

namespace datadist::test {

LocalCache::LocalCache(const CacheShape &shape, uint64_t seed) : arena_(shape) {
  arena_.Fill(PatternOf(shape, seed));
  const auto id = regions_->Register(DescOf(shape), arena_.Addrs());
  EXPECT_TRUE(id.ok());
  pin_ = regions_->Pin(id.value()).value();
}

PushRequest CallsTo::RequestOf(const TransferOp &op, Deadline deadline) {
  PushRequest request;
  request.cache_id = op.remote->cache_id;
  request.generation = op.remote->generation;
  request.first_tensor = op.remote_first_tensor;
  request.source = Told(op.local->cache());
  request.source_first_tensor = op.local_first_tensor;
  request.tensor_count = op.tensor_count;
  request.remaining_ms = deadline.WireMillis();
  for (const Run &run : op.runs) {
    request.runs.push_back({run.local_offset, run.remote_offset, run.length});
  }
  return request;
}

std::unique_ptr<DataPath> ConnectCma(Owner &owner, PeerCalls *calls, std::shared_ptr<WorkerPool> pool) {
  const std::shared_ptr<const PeerProcess> process = owner.Process();
  const Status probed = ProbeCma(*process);
  EXPECT_TRUE(probed.ok()) << probed.text();
  return MakeCmaDataPath(process, calls, std::move(pool));
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
