// A link of an endpoint with itself, under any cluster id: its peer's caches are our own.
//
// Two ordinary links over a socket pair, of which only the first is in a table; it owns the second. So a loopback peer
// has the same states, checks and transports as any other.
#ifndef DATADIST_LINK_LOOPBACK_H_
#define DATADIST_LINK_LOOPBACK_H_

#include <cstdint>
#include <memory>

#include "base/status.h"
#include "link/endpoint.h"
#include "link/link.h"

namespace datadist {

// The half that initiates, to be put into `table` and established by the caller; the other half is established.
Result<std::shared_ptr<Link>> MakeLoopback(const std::shared_ptr<LocalEndpoint> &endpoint,
                                           const std::shared_ptr<LinkTable> &table, uint64_t peer_id);

}  // namespace datadist

#endif  // DATADIST_LINK_LOOPBACK_H_
