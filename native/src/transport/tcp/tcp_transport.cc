#include "transport/tcp/tcp_transport.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "base/bytes.h"
#include "transport/tcp/tcp_data_path.h"
#include "transport/tcp/tcp_service.h"

namespace datadist {
namespace {

// For the data connections of all links. A thread copies several GB/s, more than most networks carry.
size_t DataThreads() { return std::clamp<size_t>(std::thread::hardware_concurrency(), 2, 8); }

// 0: not an offer of this transport.
uint16_t StreamsIn(const Blob &offer) {
  Reader reader(offer.data(), offer.size());
  const uint16_t streams = reader.U16();
  return reader.Finished() && streams <= kMaxDataConnections ? streams : 0;
}

class TcpOwnerPath final : public OwnerPath {
 public:
  void Add(std::unique_ptr<TcpServer> server) { servers_.push_back(std::move(server)); }
  void Close() override {
    for (const auto &server : servers_) {
      server->Close();
    }
  }
  void Join() override {
    for (const auto &server : servers_) {
      server->Join();
    }
  }

 private:
  std::vector<std::unique_ptr<TcpServer>> servers_;
};

class TcpTransport final : public Transport {
 public:
  explicit TcpTransport(const TransportHost &host) : host_(host), service_(DataThreads()) {}

  void Stop() override { service_.Stop(); }
  Blob Offer() const override {
    Writer writer;
    writer.U16(host_.tcp_streams);
    return writer.Take();
  }
  Status Reaches(const TransportPeer &peer) const override { return Admits(peer); }
  Status Admits(const TransportPeer &peer) const override {
    return StreamsIn(peer.offer) > 0 ? Status::Ok()
                                     : Status(llm_datadist::LLM_LINK_FAILED, "needs 1 to 16 streams of the peer");
  }
  uint16_t Connections(const TransportPeer &peer) const override {
    return std::min(host_.tcp_streams, StreamsIn(peer.offer));
  }
  std::unique_ptr<DataPath> MakePath(const TransportPeer &, std::vector<Fd> connections, PeerCalls *) const override {
    return MakeTcpDataPath(std::move(connections), host_.pool);
  }
  std::unique_ptr<OwnerPath> Serve(const TransportPeer &peer, std::vector<Fd> connections) const override {
    auto owner = std::make_unique<TcpOwnerPath>();
    for (Fd &connection : connections) {
      owner->Add(std::make_unique<TcpServer>(service_, std::move(connection), host_.regions, peer.cluster_id,
                                             host_.max_peer_hold));
    }
    return owner;
  }

 private:
  const TransportHost host_;
  TcpService service_;
};

}  // namespace

std::unique_ptr<Transport> MakeTcpTransport(const TransportHost &host) { return std::make_unique<TcpTransport>(host); }

}  // namespace datadist
