#include "transport/cma/cma_transport.h"

#include <utility>

#include "transport/cma/addresses.h"
#include "transport/cma/cma_data_path.h"

namespace datadist {
namespace {

using llm_datadist::LLM_LINK_FAILED;

class CmaOwnerPath final : public OwnerPath {
 public:
  explicit CmaOwnerPath(std::unique_ptr<DataPath> reading) : reading_(std::move(reading)) {}
  DataPath *reading() override { return reading_.get(); }
  void Close() override { reading_->Close(); }

 private:
  const std::unique_ptr<DataPath> reading_;
};

class CmaTransport final : public Transport {
 public:
  explicit CmaTransport(std::shared_ptr<WorkerPool> pool) : pool_(std::move(pool)) {}

  void Start() override { AllowCmaFromPeers(); }
  Status Reaches(const TransportPeer &peer) const override {
    return peer.process != nullptr ? ProbeCma(*peer.process)
                                   : Status(LLM_LINK_FAILED, "the peer is not known to be on this host");
  }
  Status Admits(const TransportPeer &peer) const override {
    return peer.process != nullptr ? Status::Ok()
                                   : Status(LLM_LINK_FAILED, "is for a peer that the kernel names, on this host");
  }
  std::unique_ptr<DataPath> MakePath(const TransportPeer &peer, std::vector<Fd>, PeerCalls *calls) const override {
    return MakeCmaDataPath(peer.process, calls, pool_);
  }
  std::unique_ptr<OwnerPath> Serve(const TransportPeer &peer, std::vector<Fd>) const override {
    return std::make_unique<CmaOwnerPath>(MakeCmaDataPath(peer.process, nullptr, pool_));
  }

 private:
  Blob BlobOf(const RegisteredCache &cache) const override { return AddressesOf(cache); }

  const std::shared_ptr<WorkerPool> pool_;
};

}  // namespace

std::unique_ptr<Transport> MakeCmaTransport(const TransportHost &host) {
  return std::make_unique<CmaTransport>(host.pool);
}

}  // namespace datadist
