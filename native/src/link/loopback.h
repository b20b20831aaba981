// A link of an endpoint with itself, under any cluster id: its peer's caches are our own.
//
// Two ordinary links over a socket pair, of which only the first is in a table; it owns the second. So a loopback peer
// has the same states, checks and transports as any other.
#ifndef DATADIST_LINK_LOOPBACK_H_
#define DATADIST_LINK_LOOPBACK_H_

#include <cstdint>
#include <memory>
#include <string>

#include "base/status.h"
#include "link/endpoint.h"
#include "link/link_table.h"

namespace datadist {

struct LoopbackPeer {
  uint64_t cluster_id = 0;
  uint64_t caller_id = 0;  // what the caller took the id for
  std::string address;     // what stands for the peer's in reports and in the log
  std::string comm_name;   // of a bilateral link
};

// Establishes it and puts it into the table; the caller has reserved its place.
Status LinkLoopback(const std::shared_ptr<LocalEndpoint> &endpoint, const std::shared_ptr<LinkTable> &table,
                    const LoopbackPeer &peer);

}  // namespace datadist

#endif  // DATADIST_LINK_LOOPBACK_H_
