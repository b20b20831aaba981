// Serves all data connections of an endpoint, however many there are, with a few threads:
//
//   TcpServer (one per connection) ──> TcpService ──> the thread with the fewest of them, its epoll ──> TcpConnection
//
// A connection stays with its thread, which keeps it and its client's thread on one core where that is faster; those of
// one link are on several. It is watched while it waits for its peer, and gets turns of bounded length, in the order in
// which connections became ready: a peer that is slow, or stopped, holds up nobody. A thread is started when there is a
// connection for it, and sleeps when there is nothing to do.
#ifndef DATADIST_TRANSPORT_TCP_TCP_SERVICE_H_
#define DATADIST_TRANSPORT_TCP_TCP_SERVICE_H_

#include <chrono>
#include <cstddef>
#include <memory>

#include "base/fd.h"
#include "memory/region_table.h"

namespace datadist {

class TcpService {
 public:
  explicit TcpService(size_t max_threads);
  ~TcpService();  // Stop
  TcpService(const TcpService &) = delete;
  TcpService &operator=(const TcpService &) = delete;

  // Ends every connection and the threads. Idempotent. Not on a thread of its own.
  void Stop();

 private:
  friend class TcpServer;
  class State;
  const std::shared_ptr<State> state_;
};

// One data connection, served from its construction on. Where the system has no thread or descriptor for it, the peer
// sees a closed connection, as with any other loss.
class TcpServer {
 public:
  // See TcpConnection.
  TcpServer(const TcpService &service, Fd stream, std::shared_ptr<RegionTable> regions, uint64_t peer,
            std::chrono::milliseconds max_request);
  ~TcpServer();  // Close and Join
  TcpServer(const TcpServer &) = delete;
  TcpServer &operator=(const TcpServer &) = delete;

  // From any thread. The connection ends soon.
  void Close();
  // Returns when nothing of the peer's touches our memory any more. Once closed.
  void Join();

 private:
  friend class TcpService;
  struct Served;
  struct Worker;
  const std::shared_ptr<TcpService::State> service_;
  const std::unique_ptr<Served> served_;
};

}  // namespace datadist

#endif  // DATADIST_TRANSPORT_TCP_TCP_SERVICE_H_
