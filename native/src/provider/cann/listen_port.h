// A port for CANN's listener: the library takes none for "any", and tells nobody which one it has.
#ifndef DATADIST_PROVIDER_CANN_LISTEN_PORT_H_
#define DATADIST_PROVIDER_CANN_LISTEN_PORT_H_

#include <cstdint>
#include <string>

#include "base/status.h"

namespace datadist::cann {

// What llm.ListenIpInfo says: an IPv4 address and a port, 0 for one of the system's choice.
struct ListenAddress {
  std::string ip;
  uint16_t port = 0;
  std::string ToString() const { return ip + ":" + std::to_string(port); }
};

// LLM_PARAM_INVALID for anything else, IPv6 included: the library listens on it, and then links to no such address.
Result<ListenAddress> ParseListenAddress(const std::string &text);

// Free a moment ago: somebody else may take it before the library does. LLM_FAILED where the address is none of ours.
Result<uint16_t> FindFreePort(const std::string &ip);
bool IsFree(const ListenAddress &address);

}  // namespace datadist::cann

#endif  // DATADIST_PROVIDER_CANN_LISTEN_PORT_H_
