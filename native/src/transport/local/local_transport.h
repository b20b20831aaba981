// The transport "local". Offered is the number of an endpoint of this process: it means something only where the kernel
// says that the peer is this process.
#ifndef DATADIST_TRANSPORT_LOCAL_LOCAL_TRANSPORT_H_
#define DATADIST_TRANSPORT_LOCAL_LOCAL_TRANSPORT_H_

#include <memory>

#include "transport/registry.h"

namespace datadist {

std::unique_ptr<Transport> MakeLocalTransport(const TransportHost &host);

}  // namespace datadist

#endif  // DATADIST_TRANSPORT_LOCAL_LOCAL_TRANSPORT_H_
