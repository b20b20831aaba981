// Which library the provider "cann" takes, and what it says of one that it does not take.
#include <dlfcn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "llm_datadist/llm_datadist_ext.h"
#include "provider/cann/abi.h"
#include "provider/cann/loader.h"
#include "provider/provider.h"
#include "support/standin.h"

namespace datadist::testing {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::StartsWith;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitizer = true;
#else
constexpr bool kSanitizer = false;
#endif

// The library that a process takes, or why it takes none.
std::string Loaded() {
  const Result<const cann::Library *> library = cann::LoadLibrary();
  return library.ok() ? library.value()->file : library.status().text();
}

// With the variable at `file`, after `before`.
std::string LoadedFrom(const std::string &file, const std::function<void()> &before = [] {}) {
  return InChild([&] {
    ::setenv(cann::kLibraryVariable, file.c_str(), 1);
    before();
    return Loaded();
  });
}

void Preload(const std::string &name) {
  if (::dlopen(BuiltFile(name).c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::fprintf(stderr, "%s\n", ::dlerror());
    std::abort();
  }
}

const std::string kStandIn = BuiltFile("standin/libllm_datadist.so");
const std::string kV1 = BuiltFile("standin/libllm_engine.so");

TEST(CannLoader, TakesTheNamedLibrary) { EXPECT_EQ(LoadedFrom(kStandIn), kStandIn); }

TEST(CannLoader, SaysHowToComeByALibrary) {
  EXPECT_THAT(LoadedFrom("/nowhere/libllm_datadist.so"),
              AllOf(HasSubstr("/nowhere/libllm_datadist.so"), HasSubstr("set_env.sh"),
                    HasSubstr("DATADIST_CANN_LIBRARY")));
  EXPECT_THAT(InChild([] {
                ::unsetenv(cann::kLibraryVariable);
                return Loaded();
              }),
              HasSubstr("libllm_datadist.so: cannot open shared object file"));
}

TEST(CannLoader, TriesAgainWhatDidNotLoad) {
  EXPECT_EQ(LoadedFrom("/nowhere/libllm_datadist.so",
                       [] {
                         Loaded();
                         ::setenv(cann::kLibraryVariable, kStandIn.c_str(), 1);
                       }),
            kStandIn);
}

TEST(CannLoader, RefusesTheV1Library) {
  EXPECT_THAT(LoadedFrom(kV1), AllOf(HasSubstr(kV1), HasSubstr("V1 API"), HasSubstr("set_env.sh")));
}

TEST(CannLoader, RefusesOurOwnLibrary) {
  const std::string ours = BuiltFile("libllm_datadist.so");
  EXPECT_THAT(LoadedFrom(ours), AllOf(HasSubstr(ours), HasSubstr("vllm-datadist-connector itself")));
  // By its name, which it has from the library that it stands in for, where somebody loaded it before.
  EXPECT_THAT(LoadedFrom("libllm_datadist.so", [] { Preload("libllm_datadist.so"); }),
              AllOf(HasSubstr(ours), HasSubstr("vllm-datadist-connector itself")));
}

TEST(CannLoader, TakesTheNamedLibraryBesideOurOwn) {
  const auto before = [] { ::dlopen(BuiltFile("libllm_datadist.so").c_str(), RTLD_NOW | RTLD_LOCAL); };
  EXPECT_EQ(LoadedFrom(kStandIn, before), kStandIn);
}

TEST(CannLoader, NamesAMissingSymbol) {
  const std::string incomplete = BuiltFile("standin/incomplete/libllm_datadist.so");
  EXPECT_THAT(LoadedFrom(incomplete), AllOf(HasSubstr(incomplete), HasSubstr("12PushKvBlocks"), HasSubstr("8.5")));
  EXPECT_THAT(LoadedFrom(BuiltFile("standin/libmetadef.so")), HasSubstr("is no LLM-DataDist library"));
}

// Its own calls would end in the other library, and no flag of ours could change that any more.
TEST(CannLoader, RefusesALibraryWhoseCallsAnotherOneAnswers) {
  EXPECT_THAT(LoadedFrom(kStandIn,
                         [] {
                           Preload("standin/libllm_engine.so");
                           Preload("standin/libllm_datadist.so");
                         }),
              AllOf(HasSubstr(kStandIn), HasSubstr(kV1), HasSubstr("RTLD_DEEPBIND")));
}

TEST(CannLoader, TakesALibraryThatSomebodyElseLoadedAlone) {
  EXPECT_EQ(LoadedFrom(kStandIn, [] { Preload("standin/libllm_datadist.so"); }), kStandIn);
}

// Every toolkit has the V1 library, and a process may have loaded it for all to see.
TEST(CannLoader, TheLibraryCallsItselfBesideTheV1Library) {
  if (kSanitizer) {
    GTEST_SKIP() << "the sanitizers refuse RTLD_DEEPBIND";
  }
  const std::string told = InChild([] {
    Preload("standin/libllm_engine.so");
    UseStandIn();
    auto provider = MakeProvider("cann", 1, llm_datadist::LlmRole::kMix);
    return provider.ok() ? provider.value()->Initialize({{"llm.DeviceId", "0"}}).text() : provider.status().text();
  });
  EXPECT_EQ(told, "");
}

TEST(CannLoader, ProvidersAreThoseThatCanBeLoaded) {
  const auto names = [] {
    std::string all;
    for (const std::string &name : ProviderNames()) {
      all += name + " ";
    }
    return all;
  };
  EXPECT_EQ(InChild([&] { return ::unsetenv(cann::kLibraryVariable), names(); }), "engine ");
  EXPECT_EQ(InChild([&] { return UseStandIn(), names(); }), "engine cann ");
  EXPECT_THAT(InChild([] {
                ::unsetenv(cann::kLibraryVariable);
                return MakeProvider("cann", 1, llm_datadist::LlmRole::kMix).status().text();
              }),
              StartsWith("CANN's LLM-DataDist is not here: "));
}

// ---- the binary interface ----

// The public header has the names and the layouts of the documented API, and a compiler made these symbols of it.
TEST(CannAbi, MembersAreNamedAsThoseOfThePublicHeader) {
  void *const ours = ::dlopen(BuiltFile("libllm_datadist.so").c_str(), RTLD_NOW | RTLD_LOCAL);
  ASSERT_NE(ours, nullptr) << ::dlerror();
  size_t members = 0;
  for (const char *symbol : cann::SymbolNames()) {
    if (std::string(symbol).rfind("_ZN12llm_datadist", 0) == 0) {
      ++members;
      EXPECT_NE(::dlsym(ours, symbol), nullptr) << symbol;
    }
  }
  EXPECT_EQ(members, 17U);
  EXPECT_EQ(cann::SymbolNames().size(), 19U);
}

#define SAME_MEMBER(ours, theirs, member) \
  static_assert(offsetof(ours, member) == offsetof(theirs, member) && sizeof(ours::member) == sizeof(theirs::member))

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Winvalid-offsetof"
static_assert(sizeof(cann::String) == sizeof(ge::AscendString));
static_assert(sizeof(cann::OptionMap) == sizeof(std::map<ge::AscendString, ge::AscendString>));
static_assert(sizeof(cann::IpInfo) == sizeof(llm_datadist::IpInfo));
SAME_MEMBER(cann::IpInfo, llm_datadist::IpInfo, ip);
SAME_MEMBER(cann::IpInfo, llm_datadist::IpInfo, port);
static_assert(sizeof(cann::ClusterInfo) == sizeof(llm_datadist::ClusterInfo));
SAME_MEMBER(cann::ClusterInfo, llm_datadist::ClusterInfo, remote_cluster_id);
SAME_MEMBER(cann::ClusterInfo, llm_datadist::ClusterInfo, remote_role_type);
SAME_MEMBER(cann::ClusterInfo, llm_datadist::ClusterInfo, local_ip_infos);
SAME_MEMBER(cann::ClusterInfo, llm_datadist::ClusterInfo, remote_ip_infos);
static_assert(sizeof(cann::CacheIndex) == sizeof(llm_datadist::CacheIndex));
SAME_MEMBER(cann::CacheIndex, llm_datadist::CacheIndex, cluster_id);
SAME_MEMBER(cann::CacheIndex, llm_datadist::CacheIndex, cache_id);
SAME_MEMBER(cann::CacheIndex, llm_datadist::CacheIndex, batch_index);
static_assert(sizeof(cann::CacheDesc) == sizeof(llm_datadist::CacheDesc));
SAME_MEMBER(cann::CacheDesc, llm_datadist::CacheDesc, placement);
SAME_MEMBER(cann::CacheDesc, llm_datadist::CacheDesc, num_tensors);
SAME_MEMBER(cann::CacheDesc, llm_datadist::CacheDesc, data_type);
SAME_MEMBER(cann::CacheDesc, llm_datadist::CacheDesc, shape);
static_assert(sizeof(cann::Cache) == sizeof(llm_datadist::Cache));
SAME_MEMBER(cann::Cache, llm_datadist::Cache, cache_id);
SAME_MEMBER(cann::Cache, llm_datadist::Cache, tensor_addrs);
SAME_MEMBER(cann::Cache, llm_datadist::Cache, cache_desc);
static_assert(sizeof(cann::ExtParam) == sizeof(llm_datadist::KvCacheExtParam));
SAME_MEMBER(cann::ExtParam, llm_datadist::KvCacheExtParam, src_layer_range);
SAME_MEMBER(cann::ExtParam, llm_datadist::KvCacheExtParam, dst_layer_range);
SAME_MEMBER(cann::ExtParam, llm_datadist::KvCacheExtParam, tensor_num_per_layer);
static_assert(sizeof(cann::RegisterCfg) == sizeof(llm_datadist::RegisterCfg));
static_assert(sizeof(cann::Object) == sizeof(llm_datadist::LlmDataDist));
#pragma GCC diagnostic pop

// The library's strings are of the other C++ ABI than ours: they are made, ordered and freed without being read here.
TEST(CannAbi, StringsAreTheLibrarys) {
  EXPECT_EQ(InChild([] {
              UseStandIn();
              const Result<const cann::Library *> library = cann::LoadLibrary();
              if (!library.ok()) {
                return library.status().text();
              }
              const cann::StringCalls &calls = library.value()->calls.strings;
              cann::OptionMap map(cann::StringLess{calls.less});
              for (const char *key : {"b", "c", "a", "", "b"}) {
                map.emplace(cann::String(calls, key), cann::String(calls, std::string(100, 'x')));
              }
              void *const metadef = ::dlopen(BuiltFile("standin/libmetadef.so").c_str(), RTLD_NOW);
              const auto text = reinterpret_cast<const char *(*)(const void *)>(::dlsym(metadef, "StandInText"));
              std::string keys;
              for (const auto &[key, value] : map) {
                keys += std::string(text(&key)) + ";";
              }
              return keys;
            }),
            ";a;b;c;");
}

}  // namespace
}  // namespace datadist::testing
