// Any host: scatter/gather straight from source blocks into destination blocks over several connections.
//
// The link's client dials every data connection of both directions, because only the server listens; after its attach
// frame (control/) a connection carries the request/response protocol of wire.h, always started by the same end: the
// initiator holds a DataPath over its connections, the owner of the memory a TcpServer for each.
#ifndef DATADIST_TRANSPORT_TCP_TCP_DATA_PATH_H_
#define DATADIST_TRANSPORT_TCP_TCP_DATA_PATH_H_

#include <chrono>
#include <memory>
#include <vector>

#include "base/fd.h"
#include "base/worker_pool.h"
#include "transport/transport.h"

namespace datadist {

// Takes connected, attached sockets.
std::unique_ptr<DataPath> MakeTcpDataPath(std::vector<Fd> streams, std::shared_ptr<WorkerPool> pool);

// Serves one data connection on a thread of its own, so that a slow peer holds up nobody else. Each request names
// (cache, generation, tensors, runs of offset and length); it is resolved and checked against the region table before a
// byte moves, under a pin. A malformed request ends the connection. A request holds its pin no longer than the smaller
// of the time that the peer gave and `max_request`.
class TcpServer {
 public:
  TcpServer(Fd stream, std::shared_ptr<RegionTable> regions, std::chrono::milliseconds max_request);
  ~TcpServer();  // Close and join
  TcpServer(const TcpServer &) = delete;
  TcpServer &operator=(const TcpServer &) = delete;
  void Close();
  // Returns when its thread has ended. Once closed.
  void Join();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace datadist

#endif  // DATADIST_TRANSPORT_TCP_TCP_DATA_PATH_H_
