// A port for CANN's listener: the library takes none for "any", and tells nobody which one it has.
#ifndef DATADIST_PROVIDER_CANN_LISTEN_PORT_H_
#define DATADIST_PROVIDER_CANN_LISTEN_PORT_H_

#include <cstdint>
#include <functional>

#include "base/status.h"
#include "provider/provider.h"

namespace datadist::cann {

// act(options), in which llm.ListenIpInfo has a free port in place of 0; the port that it has then, 0 for no listener.
// Somebody else may take the port before `act` does: then with another one, a few times.
//
// LLM_PARAM_INVALID for IPv6: the library would listen there, and none links to such an address. Otherwise what `act`
// failed with.
Result<uint16_t> WithListenPort(Options options, const std::function<Status(const Options &)> &act);

}  // namespace datadist::cann

#endif  // DATADIST_PROVIDER_CANN_LISTEN_PORT_H_
