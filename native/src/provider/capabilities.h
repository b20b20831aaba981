// What a Provider can do and what it demands: plain data, so that its users adapt to it and never ask for its name.
#ifndef DATADIST_PROVIDER_CAPABILITIES_H_
#define DATADIST_PROVIDER_CAPABILITIES_H_

#include <cstdint>

namespace datadist {

// A limit of 0 is none. The values here are those of a provider that can do whatever may be asked.
struct Capabilities {
  bool engine_options = true;  // it takes the options named "datadist."
  bool reports_port = true;    // ListenPort() tells a port that the system chose
  bool reports_links = true;   // QueryLink() tells; otherwise no link can be known to be dead
  bool ipv6 = true;
  bool host_memory = true;
  bool device_memory = true;

  // Memory registered after a link was made is unknown over that link.
  bool register_before_link = false;
  // Whatever a call writes here is written when it returns, however it ends. Otherwise a call that failed may go on
  // writing until its link has been unlinked by force.
  bool writes_end_with_call = true;
  // GrantWrites and RevokeWrites; otherwise peers write wherever they like.
  bool grants_writes = true;
  // When one side unlinks or dies, the other's half of the link goes, too.
  bool peer_drops_half = true;
  // Two that link with each other at once both get an answer.
  bool crossing_links = true;
  // A side that only pulls must listen as well.
  bool both_listen = false;

  uint32_t max_addrs_per_cache = 0;
  uint32_t max_regions = 0;  // distinct (address, size) pairs over all registrations
  uint32_t max_links = 0;    // of this endpoint
  uint32_t min_run_bytes = 0;  // shorter contiguous runs are possible, and too slow to be of use
  int32_t min_link_timeout_ms = 0;
};

}  // namespace datadist

#endif  // DATADIST_PROVIDER_CAPABILITIES_H_
