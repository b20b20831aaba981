// What CANN's library answered, in words: it has none itself.
#ifndef DATADIST_PROVIDER_CANN_STATUS_H_
#define DATADIST_PROVIDER_CANN_STATUS_H_

#include <string>

#include "base/status.h"
#include "provider/cann/abi.h"

namespace datadist::cann {

// Whether a code is about a link being made or dropped, a transfer, or anything else: the same code asks for different
// things to be done.
enum class CallKind : uint8_t { kLink, kTransfer, kOther };

// The library's code, what it means there and what to do; `about` names the peer or the cache. Ok for success.
Status Explain(CallKind kind, Code code, const std::string &about = "");

}  // namespace datadist::cann

#endif  // DATADIST_PROVIDER_CANN_STATUS_H_
