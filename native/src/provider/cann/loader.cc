#include "provider/cann/loader.h"

#include <dlfcn.h>

#include <cstdlib>
#include <iterator>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>

#include "base/log.h"

namespace datadist::cann {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_FEATURE_NOT_ENABLED;

// RTLD_DEEPBIND: the library's calls of its own functions would else end in the first library of the process that
// exports them, and every toolkit has a second one. The sanitizers refuse the flag.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int kOpenFlags = RTLD_NOW | RTLD_LOCAL;
#else
constexpr int kOpenFlags = RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND;
#endif

constexpr char kSoname[] = "libllm_datadist.so";
constexpr char kHowTo[] =
    "source the set_env.sh of CANN 8.5 or newer, or set DATADIST_CANN_LIBRARY to its lib64/libllm_datadist.so";

constexpr char kInitialize[] =
    "_ZN12llm_datadist11LlmDataDist10InitializeERKSt3mapIN2ge12AscendStringES3_St4lessIS3_ESaISt4pairIKS3_S3_EEE";
// llm_datadist::GetLastErrorText(): an addition of ours that CANN's library has not.
constexpr char kOurs[] = "_ZN12llm_datadist16GetLastErrorTextEv";

// Exported by the library that we mean, and not called: their absence says that it is another one.
constexpr const char *kUncalled[] = {
    "_ZN12llm_datadist11LlmDataDist13AllocateCacheERKNS_9CacheDescERNS_5CacheE",
    "_ZN12llm_datadist11LlmDataDist15DeallocateCacheEl",
    "_ZN12llm_datadist11LlmDataDist11CopyKvCacheERKNS_5CacheES3_jjml",
    "_ZN12llm_datadist11LlmDataDist12CopyKvBlocksERKNS_5CacheES3_RKSt6vectorImSaImEERKS4_IS6_SaIS6_EE",
};

// bind(function pointer, mangled name) for each that is called.
template <typename Bind>
void ForEachCall(Calls &calls, const Bind &bind) {
  bind(calls.construct, "_ZN12llm_datadist11LlmDataDistC1EmNS_7LlmRoleE");
  bind(calls.destroy, "_ZN12llm_datadist11LlmDataDistD1Ev");
  bind(calls.initialize, kInitialize);
  bind(calls.finalize, "_ZN12llm_datadist11LlmDataDist8FinalizeEv");
  bind(calls.set_role,
       "_ZN12llm_datadist11LlmDataDist7SetRoleENS_7LlmRoleERKSt3mapIN2ge12AscendStringES4_St4lessIS4_ESaISt4pairIKS4_"
       "S4_EEE");
  bind(calls.link,
       "_ZN12llm_datadist11LlmDataDist15LinkLlmClustersERKSt6vectorINS_11ClusterInfoESaIS2_EERS1_IjSaIjEEi");
  bind(calls.unlink,
       "_ZN12llm_datadist11LlmDataDist17UnlinkLlmClustersERKSt6vectorINS_11ClusterInfoESaIS2_EERS1_IjSaIjEEib");
  bind(calls.register_cache,
       "_ZN12llm_datadist11LlmDataDist15RegisterKvCacheERKNS_9CacheDescERKSt6vectorImSaImEERKNS_11RegisterCfgERl");
  bind(calls.unregister_cache, "_ZN12llm_datadist11LlmDataDist17UnregisterKvCacheEl");
  bind(calls.pull_cache,
       "_ZN12llm_datadist11LlmDataDist11PullKvCacheERKNS_10CacheIndexERKNS_5CacheEjlRKNS_15KvCacheExtParamE");
  bind(calls.pull_blocks,
       "_ZN12llm_datadist11LlmDataDist12PullKvBlocksERKNS_10CacheIndexERKNS_5CacheERKSt6vectorImSaImEESB_RKNS_"
       "15KvCacheExtParamE");
  bind(calls.push_cache,
       "_ZN12llm_datadist11LlmDataDist11PushKvCacheERKNS_5CacheERKNS_10CacheIndexEjlRKNS_15KvCacheExtParamE");
  bind(calls.push_blocks,
       "_ZN12llm_datadist11LlmDataDist12PushKvBlocksERKNS_5CacheERKNS_10CacheIndexERKSt6vectorImSaImEESB_RKNS_"
       "15KvCacheExtParamE");
  bind(calls.strings.construct, "_ZN2ge12AscendStringC1EPKc");
  bind(calls.strings.less, "_ZNK2ge12AscendStringltERKS0_");
}

std::string FileOf(void *address) {
  Dl_info info{};
  return address != nullptr && ::dladdr(address, &info) != 0 && info.dli_fname != nullptr ? info.dli_fname : "";
}

Status Unusable(const std::string &file, const std::string &why) {
  return Status(LLM_FAILED, "CANN's LLM-DataDist cannot be used: " + file + " " + why);
}

// RTLD_DEEPBIND has no effect on what is loaded already. If another library answers for its names, then its own calls
// go there, too, and objects of one are handed to the other.
Status CheckPreloaded(const std::string &name) {
  void *const loaded = ::dlopen(name.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (loaded == nullptr) {
    return Status::Ok();
  }
  const std::string file = FileOf(::dlsym(loaded, kInitialize));
  const std::string answering = FileOf(::dlsym(RTLD_DEFAULT, kInitialize));
  ::dlclose(loaded);
  if (answering.empty() || answering == file) {
    return Status::Ok();
  }
  return Unusable(file, "was loaded by somebody else without RTLD_DEEPBIND, and " + answering +
                            " answers its calls; load neither before this, by LD_PRELOAD or an import");
}

Status Bind(void *library, const std::string &name, Library &bound) {
  bound.file = FileOf(::dlsym(library, kInitialize));
  if (bound.file.empty()) {
    return Unusable(name, "is no LLM-DataDist library: it has no llm_datadist::LlmDataDist; " + std::string(kHowTo));
  }
  if (::dlsym(library, kOurs) != nullptr) {
    return Unusable(bound.file,
                    "is the library of vllm-datadist-connector itself, not CANN's; it is in LD_LIBRARY_PATH, or was "
                    "loaded before; " +
                        std::string(kHowTo));
  }
  const char *missing = nullptr;
  const auto find = [&](const char *symbol) {
    void *const address = ::dlsym(library, symbol);
    missing = address == nullptr ? symbol : missing;
    return address;
  };
  ForEachCall(bound.calls, [&](auto &call, const char *symbol) {
    call = reinterpret_cast<std::remove_reference_t<decltype(call)>>(find(symbol));
  });
  for (const char *symbol : kUncalled) {
    find(symbol);
  }
  if (missing != nullptr) {
    return Unusable(bound.file, "has no " + std::string(missing) + ": CANN 8.5 or newer is needed");
  }
  return Status::Ok();
}

// The V1 API has the same names. Before Initialize it already tells that it has no registration; the V2 API tells that
// it is not initialized.
Status CheckGeneration(const Library &library) {
  Object probe;
  library.calls.construct(&probe, 0, static_cast<int32_t>(llm_datadist::LlmRole::kMix));
  int64_t cache_id = 0;
  const Code code = library.calls.register_cache(&probe, {}, {}, {}, cache_id);
  library.calls.destroy(&probe);
  if (code != LLM_FEATURE_NOT_ENABLED) {
    return Status::Ok();
  }
  return Unusable(library.file, "has no registration of caches: it is that of the V1 API; " + std::string(kHowTo));
}

Result<std::unique_ptr<const Library>> Open(const std::string &name) {
  if (Status preloaded = CheckPreloaded(name); !preloaded.ok()) {
    return preloaded;
  }
  void *const opened = ::dlopen(name.c_str(), kOpenFlags);
  if (opened == nullptr) {
    return Status(LLM_FAILED, "CANN's LLM-DataDist is not here: " + std::string(::dlerror()) + "; " + kHowTo);
  }
  auto library = std::make_unique<Library>();
  if (Status bound = Bind(opened, name, *library); !bound.ok()) {
    ::dlclose(opened);
    return bound;
  }
  // From here on it has been called, and stays: nobody knows what it left behind.
  if (Status generation = CheckGeneration(*library); !generation.ok()) {
    return generation;
  }
  Result<Device> device = Device::Load();
  if (!device.ok()) {
    return device.status();
  }
  library->device = device.value();
  Log(LogLevel::kInfo, "LLM-DataDist of CANN: " + library->file);
  return std::unique_ptr<const Library>(std::move(library));
}

}  // namespace

Result<const Library *> LoadLibrary() {
  static std::mutex mutex;
  // Never freed: at exit the library's threads may still run.
  static const Library *loaded = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (loaded == nullptr) {
    const char *const file = std::getenv(kLibraryVariable);
    auto opened = Open(file != nullptr && *file != '\0' ? file : kSoname);
    if (!opened.ok()) {
      return opened.status();
    }
    loaded = std::move(opened).value().release();
  }
  return loaded;
}

const std::vector<const char *> &SymbolNames() {
  static const std::vector<const char *> names = [] {
    std::vector<const char *> all(std::begin(kUncalled), std::end(kUncalled));
    Calls unused{};
    ForEachCall(unused, [&](auto &, const char *symbol) { all.push_back(symbol); });
    return all;
  }();
  return names;
}

}  // namespace datadist::cann
