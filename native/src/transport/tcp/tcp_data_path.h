// Any host: scatter/gather straight from source blocks into destination blocks over several connections.
//
// The link's client dials every data connection of both directions, because only the server listens; after its attach
// frame (control/) a connection carries the request/response protocol of wire.h, always started by the same end: the
// initiator holds a DataPath over its connections, the owner of the memory a TcpServer (tcp_service.h) for each.
#ifndef DATADIST_TRANSPORT_TCP_TCP_DATA_PATH_H_
#define DATADIST_TRANSPORT_TCP_TCP_DATA_PATH_H_

#include <memory>
#include <vector>

#include "base/fd.h"
#include "base/worker_pool.h"
#include "transport/transport.h"

namespace datadist {

// Takes connected, attached sockets.
std::unique_ptr<DataPath> MakeTcpDataPath(std::vector<Fd> streams, std::shared_ptr<WorkerPool> pool);

}  // namespace datadist

#endif  // DATADIST_TRANSPORT_TCP_TCP_DATA_PATH_H_
