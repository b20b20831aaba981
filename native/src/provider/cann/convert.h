// Arguments of our public header as CANN's library takes them.
#ifndef DATADIST_PROVIDER_CANN_CONVERT_H_
#define DATADIST_PROVIDER_CANN_CONVERT_H_

#include <vector>

#include "base/status.h"
#include "llm_datadist/llm_datadist.h"
#include "provider/cann/abi.h"
#include "provider/provider.h"

namespace datadist::cann {

OptionMap ToCann(const StringCalls &strings, const Options &options);
// LLM_PARAM_INVALID for an address that is no IPv4 literal: the library would say no more than that.
Result<std::vector<ClusterInfo>> ToCann(const StringCalls &strings,
                                        const std::vector<llm_datadist::ClusterInfo> &clusters);
CacheIndex ToCann(const llm_datadist::CacheIndex &index);
CacheDesc ToCann(const llm_datadist::CacheDesc &desc);
Cache ToCann(const llm_datadist::Cache &cache);
ExtParam ToCann(const llm_datadist::KvCacheExtParam &ext);

}  // namespace datadist::cann

#endif  // DATADIST_PROVIDER_CANN_CONVERT_H_
