// The transport "cma". Nothing is offered: whose memory it is, the kernel says.
#ifndef DATADIST_TRANSPORT_CMA_CMA_TRANSPORT_H_
#define DATADIST_TRANSPORT_CMA_CMA_TRANSPORT_H_

#include <memory>

#include "transport/registry.h"

namespace datadist {

std::unique_ptr<Transport> MakeCmaTransport(const TransportHost &host);

}  // namespace datadist

#endif  // DATADIST_TRANSPORT_CMA_CMA_TRANSPORT_H_
