// CANN's LLM-DataDist as a Provider, on hosts that have it.
#ifndef DATADIST_PROVIDER_CANN_CANN_H_
#define DATADIST_PROVIDER_CANN_CANN_H_

#include <cstdint>
#include <memory>

#include "provider/provider.h"

namespace datadist::cann {

// LLM_FAILED where its library cannot be used, see LoadLibrary().
Result<std::unique_ptr<Provider>> MakeCannProvider(uint64_t cluster_id, llm_datadist::LlmRole role);

}  // namespace datadist::cann

#endif  // DATADIST_PROVIDER_CANN_CANN_H_
