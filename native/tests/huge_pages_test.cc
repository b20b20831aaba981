// Registration with OPTION_HUGE_PAGES: the kernel is asked for huge pages under the memory, and no byte changes.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <string>

#include "llm_datadist/llm_datadist.h"
#include "llm_datadist/llm_datadist_ext.h"

namespace datadist::testing {
namespace {

constexpr size_t kBytes = 16U << 20;

struct Mapping {
  Mapping() : start(::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {}
  ~Mapping() { ::munmap(start, kBytes); }
  Mapping(const Mapping &) = delete;
  Mapping &operator=(const Mapping &) = delete;
  uint8_t *bytes() const { return static_cast<uint8_t *>(start); }
  void *const start;
};

// Whether some page of the range belongs to a mapping with the flag "hg" (huge pages advised).
bool IsAdvised(const void *start) {
  const auto wanted = reinterpret_cast<uintptr_t>(start) + kBytes / 2;
  std::ifstream maps("/proc/self/smaps");
  bool inside = false;
  for (std::string line; std::getline(maps, line);) {
    uintptr_t first = 0;
    uintptr_t last = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &first, &last) == 2) {
      inside = first <= wanted && wanted < last;
    } else if (inside && line.rfind("VmFlags:", 0) == 0) {
      return line.find(" hg") != std::string::npos;
    }
  }
  return false;
}

bool IsAdvisedAfterRegistration(const char *option) {
  const Mapping memory;
  for (size_t i = 0; i < kBytes; ++i) {
    memory.bytes()[i] = static_cast<uint8_t>(i * 7);
  }
  llm_datadist::LlmDataDist datadist(1, llm_datadist::LlmRole::kMix);
  EXPECT_EQ(datadist.Initialize({{llm_datadist::OPTION_DEVICE_ID, "0"}, {llm_datadist::OPTION_HUGE_PAGES, option}}),
            llm_datadist::LLM_SUCCESS);
  llm_datadist::CacheDesc desc{};
  desc.num_tensors = 2;
  desc.data_type = llm_datadist::DT_UINT8;
  desc.shape = {8, kBytes / 2 / 8};
  const auto start = reinterpret_cast<uint64_t>(memory.start);
  int64_t id = 0;
  EXPECT_EQ(datadist.RegisterKvCache(desc, {start + kBytes / 2, start}, {}, id), llm_datadist::LLM_SUCCESS);
  for (size_t i = 0; i < kBytes; ++i) {
    if (memory.bytes()[i] != static_cast<uint8_t>(i * 7)) {
      ADD_FAILURE() << "byte " << i << " changed";
      break;
    }
  }
  return IsAdvised(memory.start);
}

TEST(HugePages, AreAskedForByTheOption) { EXPECT_TRUE(IsAdvisedAfterRegistration("1")); }

TEST(HugePages, AreNotAskedForWithoutIt) { EXPECT_FALSE(IsAdvisedAfterRegistration("0")); }

}  // namespace
}  // namespace datadist::testing
