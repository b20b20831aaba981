// CANN's libllm_datadist.so, found at run time: nothing of CANN is needed to build, to import or to test.
#ifndef DATADIST_PROVIDER_CANN_LOADER_H_
#define DATADIST_PROVIDER_CANN_LOADER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "provider/cann/abi.h"
#include "provider/cann/device.h"

namespace datadist::cann {

// Which file to load; where it is unset, what the loader finds by the name of the library.
constexpr char kLibraryVariable[] = "DATADIST_CANN_LIBRARY";

// The members of CANN's LlmDataDist, as such are called: the object first.
struct Calls {
  void (*construct)(Object *, uint64_t cluster_id, int32_t role);
  void (*destroy)(Object *);
  Code (*initialize)(Object *, const OptionMap &);
  void (*finalize)(Object *);
  Code (*set_role)(Object *, int32_t role, const OptionMap &);
  Code (*link)(Object *, const std::vector<ClusterInfo> &, std::vector<Code> &rets, int32_t timeout_ms);
  Code (*unlink)(Object *, const std::vector<ClusterInfo> &, std::vector<Code> &rets, int32_t timeout_ms, bool force);
  Code (*register_cache)(Object *, const CacheDesc &, const std::vector<uint64_t> &addrs, const RegisterCfg &,
                         int64_t &cache_id);
  Code (*unregister_cache)(Object *, int64_t cache_id);
  Code (*pull_cache)(Object *, const CacheIndex &src, const Cache &dst, uint32_t dst_row, int64_t size,
                     const ExtParam &);
  Code (*pull_blocks)(Object *, const CacheIndex &src, const Cache &dst, const std::vector<uint64_t> &src_blocks,
                      const std::vector<uint64_t> &dst_blocks, const ExtParam &);
  Code (*push_cache)(Object *, const Cache &src, const CacheIndex &dst, uint32_t src_row, int64_t size,
                     const ExtParam &);
  Code (*push_blocks)(Object *, const Cache &src, const CacheIndex &dst, const std::vector<uint64_t> &src_blocks,
                      const std::vector<uint64_t> &dst_blocks, const ExtParam &);
  StringCalls strings;
};

struct Library {
  std::string file;  // that answers the calls
  Calls calls{};
  Device device;
};

// Opens the library, once for the process; it is never closed. LLM_FAILED says which file cannot be used, why, and what
// to do: there is none, it is ours, it is that of the V1 API, it lacks a symbol, or it was loaded by somebody else in
// such a way that its own calls end in yet another library.
Result<const Library *> LoadLibrary();

// The mangled names that the library must export. For tests.
const std::vector<const char *> &SymbolNames();

}  // namespace datadist::cann

#endif  // DATADIST_PROVIDER_CANN_LOADER_H_
