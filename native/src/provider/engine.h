// Our own engine as a Provider.
#ifndef DATADIST_PROVIDER_ENGINE_H_
#define DATADIST_PROVIDER_ENGINE_H_

#include <cstdint>
#include <memory>

#include "engine/options.h"
#include "provider/provider.h"

namespace datadist {

// Its reasons begin with the name of the call where the C++ class is spoken, as that class's do.
std::unique_ptr<Provider> MakeEngineProvider(uint64_t cluster_id, llm_datadist::LlmRole role, EngineApi api);

}  // namespace datadist

#endif  // DATADIST_PROVIDER_ENGINE_H_
