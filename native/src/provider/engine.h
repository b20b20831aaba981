// Our own engine as a Provider.
#ifndef DATADIST_PROVIDER_ENGINE_H_
#define DATADIST_PROVIDER_ENGINE_H_

#include <cstdint>
#include <memory>

#include "provider/provider.h"

namespace datadist {

std::unique_ptr<Provider> MakeEngineProvider(uint64_t cluster_id, llm_datadist::LlmRole role);

}  // namespace datadist

#endif  // DATADIST_PROVIDER_ENGINE_H_
