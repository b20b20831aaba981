#include "provider/provider.h"

#include <utility>

#include "provider/cann/cann.h"
#include "provider/cann/loader.h"
#include "provider/engine.h"

namespace datadist {
namespace {

constexpr char kEngine[] = "engine";
constexpr char kCann[] = "cann";

}  // namespace

std::vector<std::string> ProviderNames() {
  std::vector<std::string> names = {kEngine};
  if (cann::LoadLibrary().ok()) {
    names.push_back(kCann);
  }
  return names;
}

Result<std::unique_ptr<Provider>> MakeProvider(const std::string &name, uint64_t cluster_id,
                                               llm_datadist::LlmRole role) {
  if (name == kEngine) {
    return MakeEngineProvider(cluster_id, role, EngineApi::kCpp);
  }
  if (name == kCann) {
    return cann::MakeCannProvider(cluster_id, role);
  }
  std::string available;
  for (const std::string &candidate : ProviderNames()) {
    available += (available.empty() ? "'" : ", '") + candidate + "'";
  }
  return Status(llm_datadist::LLM_PARAM_INVALID, "provider is '" + name + "'; available here: " + available);
}

std::unique_ptr<Provider> MakeExtendedProvider(uint64_t cluster_id, llm_datadist::LlmRole role) {
  return MakeEngineProvider(cluster_id, role, EngineApi::kPython);
}

}  // namespace datadist
