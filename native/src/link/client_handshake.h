// The dialling end of a link: from an address to an established link, on the caller's thread, within its deadline.
#ifndef DATADIST_LINK_CLIENT_HANDSHAKE_H_
#define DATADIST_LINK_CLIENT_HANDSHAKE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "base/deadline.h"
#include "base/status.h"
#include "control/address.h"
#include "link/endpoint.h"
#include "link/link_table.h"

namespace datadist {

struct DialTarget {
  SocketAddress address;
  uint64_t expected_id = 0;  // 0: whoever answers
  std::string comm_name;     // of a bilateral link; then only `expected_id`, 0 included, may answer
  int64_t comm_id = 0;       // of that comm, here
};

// Ok: the link is established and in the table, under the id that the peer announced. Otherwise LLM_LINK_FAILED,
// LLM_TIMEOUT, LLM_ALREADY_LINK, LLM_PROCESSING_LINK, LLM_PARAM_INVALID or what the peer refused with; nothing is left.
//
// Who reaches its own listener gets a loopback link. With the hixl backend a live link that so far only the peer asked
// for is what the caller asks for.
Status DialLink(const std::shared_ptr<LocalEndpoint> &endpoint, const std::shared_ptr<LinkTable> &table,
                const DialTarget &target, Deadline deadline);

}  // namespace datadist

#endif  // DATADIST_LINK_CLIENT_HANDSHAKE_H_
