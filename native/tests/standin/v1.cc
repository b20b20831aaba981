// Another library with the names of CANN's LlmDataDist: one of the V1 API, which allocates caches and registers none.
// With STANDIN_INCOMPLETE it lacks PushKvBlocks, as a library does that is too old or too new.
#include <cstdint>
#include <vector>

#include "symbols.h"

namespace {

constexpr uint32_t kFeatureNotEnabled = 0x5010B019;

}  // namespace

STANDIN_EXPORT void LlmDataDist_Constructor(void **object, uint64_t, int32_t) { *object = nullptr; }
STANDIN_EXPORT void LlmDataDist_Destructor(void **) {}
STANDIN_EXPORT uint32_t LlmDataDist_ImplInitialize(void **, const void *) { return kFeatureNotEnabled; }
STANDIN_EXPORT uint32_t LlmDataDist_Initialize(void **object, const void *options) {
  return LlmDataDist_ImplInitialize(object, options);
}
STANDIN_EXPORT void LlmDataDist_Finalize(void **) {}
STANDIN_EXPORT uint32_t LlmDataDist_SetRole(void **, int32_t, const void *) { return 0; }
STANDIN_EXPORT uint32_t LlmDataDist_LinkLlmClusters(void **, const void *, void *, int32_t) { return 0; }
STANDIN_EXPORT uint32_t LlmDataDist_UnlinkLlmClusters(void **, const void *, void *, int32_t, bool) { return 0; }
STANDIN_EXPORT uint32_t LlmDataDist_RegisterKvCache(void **, const void *, const void *, const void *, int64_t *) {
  return kFeatureNotEnabled;
}
STANDIN_EXPORT uint32_t LlmDataDist_UnregisterKvCache(void **, int64_t) { return kFeatureNotEnabled; }
STANDIN_EXPORT uint32_t LlmDataDist_PullKvBlocks() { return 0; }
#ifndef STANDIN_INCOMPLETE
STANDIN_EXPORT uint32_t LlmDataDist_PushKvBlocks() { return 0; }
#endif
STANDIN_EXPORT uint32_t LlmDataDist_PullKvCache() { return 0; }
STANDIN_EXPORT uint32_t LlmDataDist_PushKvCache() { return 0; }
STANDIN_EXPORT uint32_t LlmDataDist_AllocateCache(void **, const void *, void *) { return 0; }
STANDIN_EXPORT uint32_t LlmDataDist_DeallocateCache(void **, int64_t) { return 0; }
STANDIN_EXPORT uint32_t LlmDataDist_CopyKvCache() { return 0; }
STANDIN_EXPORT uint32_t LlmDataDist_CopyKvBlocks() { return 0; }
