#include "transport/local/local_transport.h"

#include <map>
#include <mutex>

#include "base/bytes.h"
#include "transport/local/local_data_path.h"

namespace datadist {
namespace {

using llm_datadist::LLM_LINK_FAILED;

// The memory of the endpoints of this process, by their numbers, which are never used twice.
class Endpoints {
 public:
  uint64_t Add(const std::shared_ptr<RegionTable> &regions) {
    const std::lock_guard<std::mutex> lock(mutex_);
    regions_[++last_] = regions;
    return last_;
  }
  void Remove(uint64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    regions_.erase(number);
  }
  // Empty where there is none of that number.
  std::weak_ptr<RegionTable> Find(const Blob &offer) {
    Reader reader(offer.data(), offer.size());
    const uint64_t number = reader.U64();
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto it = reader.Finished() ? regions_.find(number) : regions_.end();
    return it == regions_.end() ? std::weak_ptr<RegionTable>() : it->second;
  }

 private:
  std::mutex mutex_;
  uint64_t last_ = 0;                                      // guarded by mutex_
  std::map<uint64_t, std::weak_ptr<RegionTable>> regions_;  // guarded by mutex_
};

// Never destroyed: an endpoint may be finalized by a static object's destructor, after ours would have run.
Endpoints &TheEndpoints() {
  static auto *endpoints = new Endpoints;
  return *endpoints;
}

bool IsHere(const TransportPeer &peer) { return peer.process != nullptr && peer.process->IsSelf(); }

class LocalTransport final : public Transport {
 public:
  explicit LocalTransport(const TransportHost &host)
      : cluster_id_(host.cluster_id), pool_(host.pool), number_(TheEndpoints().Add(host.regions)) {}
  ~LocalTransport() override { TheEndpoints().Remove(number_); }

  Blob Offer() const override {
    Writer writer;
    writer.U64(number_);
    return writer.Take();
  }
  Status Reaches(const TransportPeer &peer) const override {
    return IsHere(peer) && !TheEndpoints().Find(peer.offer).expired()
               ? Status::Ok()
               : Status(LLM_LINK_FAILED, "it is in another process");
  }
  bool Expected(const TransportPeer &peer) const override { return IsHere(peer); }
  Status Admits(const TransportPeer &peer) const override {
    return IsHere(peer) ? Status::Ok()
                        : Status(LLM_LINK_FAILED, "is for a peer that the kernel names, in this process");
  }
  std::unique_ptr<DataPath> MakePath(const TransportPeer &peer, std::vector<Fd>, PeerCalls *) const override {
    return MakeLocalDataPath(TheEndpoints().Find(peer.offer), cluster_id_, pool_);
  }

 private:
  const uint64_t cluster_id_;
  const std::shared_ptr<WorkerPool> pool_;
  const uint64_t number_;
};

}  // namespace

std::unique_ptr<Transport> MakeLocalTransport(const TransportHost &host) {
  return std::make_unique<LocalTransport>(host);
}

}  // namespace datadist
