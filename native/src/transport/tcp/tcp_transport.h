// The transport "tcp". Offered is for how many data connections each way an end is good: the smaller number counts, so
// that neither makes the other serve more than it would itself.
#ifndef DATADIST_TRANSPORT_TCP_TCP_TRANSPORT_H_
#define DATADIST_TRANSPORT_TCP_TCP_TRANSPORT_H_

#include <memory>

#include "transport/registry.h"

namespace datadist {

std::unique_ptr<Transport> MakeTcpTransport(const TransportHost &host);

}  // namespace datadist

#endif  // DATADIST_TRANSPORT_TCP_TCP_TRANSPORT_H_
