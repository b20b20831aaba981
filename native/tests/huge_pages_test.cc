// Registration with OPTION_HUGE_PAGES: the kernel is asked once per memory, in the background, and no byte changes.
//
// madvise() of this program stands before the C library's: it notes what the engine asks for, and can hold a collapse
// as if the kernel took long over it.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "llm_datadist/llm_datadist.h"
#include "llm_datadist/llm_datadist_ext.h"
#include "memory/huge_pages.h"

namespace datadist::testing {
namespace {

constexpr int kCollapse = 25;
constexpr size_t kHugePage = 2U << 20;
constexpr size_t kBytes = 32U << 20;
constexpr std::chrono::milliseconds kNoTime{0};
constexpr std::chrono::milliseconds kUntilLetGo = std::chrono::hours(1);
constexpr std::chrono::milliseconds kLong{300};

// What the engine asked the kernel for.
class Kernel {
 public:
  struct Call {
    uint64_t begin;
    uint64_t end;
    int advice;
  };

  int Advise(void *start, size_t length, int advice) {
    if (advice == kCollapse || advice == MADV_HUGEPAGE) {
      std::unique_lock<std::mutex> lock(mutex_);
      const auto begin = reinterpret_cast<uint64_t>(start);
      calls_.push_back({begin, begin + length, advice});
      changed_.notify_all();
      if (advice == kCollapse) {
        ++running_;
        changed_.wait_for(lock, hold_, [this] { return hold_ == kNoTime; });
        --running_;
        if (error_ != 0) {
          errno = error_;
          return -1;
        }
      }
    }
    return static_cast<int>(::syscall(SYS_madvise, start, length, advice));
  }

  void Reset() {
    const std::lock_guard<std::mutex> lock(mutex_);
    calls_.clear();
    hold_ = kNoTime;
    error_ = 0;
  }
  // Every collapse takes that long, or until LetGo.
  void Hold(std::chrono::milliseconds time) {
    const std::lock_guard<std::mutex> lock(mutex_);
    hold_ = time;
  }
  void LetGo() {
    const std::lock_guard<std::mutex> lock(mutex_);
    hold_ = kNoTime;
    changed_.notify_all();
  }
  void FailCollapsesWith(int error) {
    const std::lock_guard<std::mutex> lock(mutex_);
    error_ = error;
  }
  void AwaitCollapse() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return CountLocked(kCollapse) > 0; });
  }
  bool running() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return running_ > 0;
  }
  // Bytes that were asked for, a byte asked for twice counting twice.
  uint64_t Bytes(int advice) {
    const std::lock_guard<std::mutex> lock(mutex_);
    uint64_t bytes = 0;
    for (const Call &call : calls_) {
      bytes += call.advice == advice ? call.end - call.begin : 0;
    }
    return bytes;
  }
  size_t Count(int advice) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return CountLocked(advice);
  }

 private:
  size_t CountLocked(int advice) const {
    return static_cast<size_t>(
        std::count_if(calls_.begin(), calls_.end(), [&](const Call &call) { return call.advice == advice; }));
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Call> calls_;
  std::chrono::milliseconds hold_ = kNoTime;
  int running_ = 0;
  int error_ = 0;
};

Kernel kernel;

// 32 MiB that begin at a huge page.
class Mapping {
 public:
  Mapping() : all_(::mmap(nullptr, kBytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    start_ = (reinterpret_cast<uint64_t>(all_) + kHugePage - 1) / kHugePage * kHugePage;
    ::syscall(SYS_madvise, start_, kBytes, MADV_NOHUGEPAGE);  // also where the machine says "always"
  }
  ~Mapping() { ::munmap(all_, kBytes + kHugePage); }
  Mapping(const Mapping &) = delete;
  Mapping &operator=(const Mapping &) = delete;

  uint64_t start() const { return start_; }
  uint64_t end() const { return start_ + kBytes; }
  void Fill() {
    for (size_t i = 0; i < kBytes; ++i) {
      bytes()[i] = static_cast<uint8_t>(i * 7);
    }
  }
  bool IsFilled() const {
    for (size_t i = 0; i < kBytes; ++i) {
      if (bytes()[i] != static_cast<uint8_t>(i * 7)) {
        return false;
      }
    }
    return true;
  }
  uint8_t *bytes() const { return reinterpret_cast<uint8_t *>(start_); }

  // Bytes of it in huge pages.
  uint64_t HugeBytes() const {
    std::ifstream maps("/proc/self/smaps");
    bool inside = false;
    uint64_t kibibytes = 0;
    for (std::string line; std::getline(maps, line);) {
      uint64_t first = 0;
      uint64_t last = 0;
      uint64_t value = 0;
      if (std::sscanf(line.c_str(), "%lx-%lx ", &first, &last) == 2) {
        inside = first < end() && start_ < last;
      } else if (inside && std::sscanf(line.c_str(), "AnonHugePages: %lu kB", &value) == 1) {
        kibibytes += value;
      }
    }
    return kibibytes << 10;
  }

 private:
  void *const all_;
  uint64_t start_ = 0;
};

class HugePagesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    kernel.Reset();
    if (!HugePagesAllowed()) {
      GTEST_SKIP() << "/sys/kernel/mm/transparent_hugepage/enabled says never";
    }
  }
  void TearDown() override { kernel.LetGo(); }
};

// An initialised endpoint and what it says of huge pages.
class Endpoint {
 public:
  explicit Endpoint(const char *option = "1") : datadist_(1, llm_datadist::LlmRole::kMix) {
    EXPECT_EQ(datadist_.Initialize({{llm_datadist::OPTION_DEVICE_ID, "0"}, {llm_datadist::OPTION_HUGE_PAGES, option}}),
              llm_datadist::LLM_SUCCESS);
  }
  int64_t Register(std::vector<uint64_t> addrs, uint64_t tensor_bytes) {
    llm_datadist::CacheDesc desc{};
    desc.num_tensors = static_cast<uint32_t>(addrs.size());
    desc.data_type = llm_datadist::DT_UINT8;
    desc.shape = {8, static_cast<int64_t>(tensor_bytes / 8)};
    int64_t id = 0;
    EXPECT_EQ(datadist_.RegisterKvCache(desc, addrs, {}, id), llm_datadist::LLM_SUCCESS)
        << llm_datadist::GetLastErrorText();
    return id;
  }
  void Unregister(int64_t id) { EXPECT_EQ(datadist_.UnregisterKvCache(id), llm_datadist::LLM_SUCCESS); }
  llm_datadist::HugePagesReport Wait() {
    llm_datadist::HugePagesReport report;
    EXPECT_EQ(llm_datadist::WaitForHugePages(datadist_, report), llm_datadist::LLM_SUCCESS);
    return report;
  }
  void Finalize() { datadist_.Finalize(); }

 private:
  llm_datadist::LlmDataDist datadist_;
};

TEST_F(HugePagesTest, LieUnderMemoryThatWasTouchedBefore) {
  Mapping memory;
  memory.Fill();
  ASSERT_EQ(memory.HugeBytes(), 0U);
  Endpoint endpoint;
  endpoint.Register({memory.start() + kBytes / 2, memory.start()}, kBytes / 2);
  const llm_datadist::HugePagesReport report = endpoint.Wait();
  EXPECT_TRUE(report.allowed);
  EXPECT_EQ(report.bytes, kBytes);
  EXPECT_TRUE(memory.IsFilled());
  if (report.huge_bytes < report.bytes) {
    GTEST_SKIP() << "this machine has no huge page to spare";
  }
  EXPECT_EQ(memory.HugeBytes(), kBytes);
  EXPECT_GT(report.seconds, 0);
}

TEST_F(HugePagesTest, ComeWithTheFirstTouchOfMemoryThatWasNot) {
  Mapping memory;
  Endpoint endpoint;
  endpoint.Register({memory.start()}, kBytes);
  endpoint.Wait();
  EXPECT_EQ(memory.HugeBytes(), 0U) << "memory that nobody has touched was filled";
  memory.Fill();
  EXPECT_GT(memory.HugeBytes(), 0U);
}

TEST_F(HugePagesTest, AreNotAskedForWithoutTheOption) {
  Mapping memory;
  Endpoint endpoint("0");
  endpoint.Register({memory.start()}, kBytes);
  EXPECT_FALSE(endpoint.Wait().allowed);
  EXPECT_EQ(kernel.Count(MADV_HUGEPAGE) + kernel.Count(kCollapse), 0U);
}

TEST_F(HugePagesTest, RegistrationDoesNotWaitForThem) {
  Mapping memory;
  memory.Fill();
  Endpoint endpoint;
  kernel.Hold(kUntilLetGo);
  endpoint.Register({memory.start()}, kBytes);
  EXPECT_EQ(kernel.Bytes(MADV_HUGEPAGE), kBytes);
  kernel.AwaitCollapse();
  endpoint.Register({memory.start()}, kBytes / 2);  // nor does one while the kernel is at it
  EXPECT_LT(kernel.Bytes(kCollapse), kBytes);
  EXPECT_EQ(memory.HugeBytes(), 0U);
  kernel.LetGo();
  endpoint.Wait();
  EXPECT_EQ(kernel.Bytes(kCollapse), kBytes);
}

TEST_F(HugePagesTest, AreAskedForOncePerMemory) {
  Mapping memory;
  memory.Fill();
  Endpoint endpoint;
  const uint64_t half = kBytes / 2;
  for (int view = 0; view < 10; ++view) {
    endpoint.Register({memory.start(), memory.start() + half}, half);
  }
  endpoint.Wait();
  endpoint.Register({memory.start() + kHugePage}, half);
  EXPECT_EQ(endpoint.Wait().bytes, kBytes);
  EXPECT_EQ(kernel.Bytes(MADV_HUGEPAGE), kBytes);
  EXPECT_EQ(kernel.Bytes(kCollapse), kBytes);
}

TEST_F(HugePagesTest, LieAcrossTheBorderOfTwoRegistrations) {
  Mapping memory;
  memory.Fill();
  Endpoint endpoint;
  const uint64_t border = kHugePage / 2 * 3;  // in the middle of the second huge page
  endpoint.Register({memory.start()}, border);
  EXPECT_EQ(endpoint.Wait().bytes, kHugePage);
  endpoint.Register({memory.start() + border}, kBytes - border);
  EXPECT_EQ(endpoint.Wait().bytes, kBytes);
  EXPECT_EQ(kernel.Bytes(MADV_HUGEPAGE), kBytes);
}

TEST_F(HugePagesTest, UnregistrationEndsTheCollapse) {
  Mapping memory;
  memory.Fill();
  Endpoint endpoint;
  kernel.Hold(kLong);
  const int64_t id = endpoint.Register({memory.start()}, kBytes);
  kernel.AwaitCollapse();
  endpoint.Unregister(id);
  EXPECT_FALSE(kernel.running()) << "returned while the kernel was at work on the memory";
  const uint64_t collapsed = kernel.Bytes(kCollapse);
  EXPECT_LT(collapsed, kBytes);
  endpoint.Wait();
  EXPECT_EQ(kernel.Bytes(kCollapse), collapsed) << "went on after the memory was given back";
}

TEST_F(HugePagesTest, UnregistrationOfOneViewLeavesItToTheOthers) {
  Mapping memory;
  memory.Fill();
  Endpoint endpoint;
  kernel.Hold(kUntilLetGo);
  const int64_t whole = endpoint.Register({memory.start()}, kBytes);
  endpoint.Register({memory.start()}, kBytes / 2);
  kernel.AwaitCollapse();
  endpoint.Unregister(whole);  // what runs lies in the half that stays: there is nothing to wait for
  EXPECT_TRUE(kernel.running());
  kernel.LetGo();
  endpoint.Wait();
  EXPECT_EQ(kernel.Bytes(kCollapse), kBytes / 2);
}

TEST_F(HugePagesTest, MemoryThatComesBackIsAskedForAnew) {
  Mapping memory;
  memory.Fill();
  Endpoint endpoint;
  const int64_t id = endpoint.Register({memory.start()}, kBytes);
  endpoint.Wait();
  endpoint.Unregister(id);
  endpoint.Register({memory.start()}, kBytes);
  endpoint.Wait();
  EXPECT_EQ(kernel.Bytes(kCollapse), 2 * kBytes);
}

TEST_F(HugePagesTest, FinalizeEndsTheCollapse) {
  Mapping memory;
  memory.Fill();
  Endpoint endpoint;
  kernel.Hold(kLong);
  endpoint.Register({memory.start()}, kBytes);
  kernel.AwaitCollapse();
  endpoint.Finalize();
  EXPECT_FALSE(kernel.running()) << "returned while the kernel was at work on the memory";
  EXPECT_LT(kernel.Bytes(kCollapse), kBytes);
}

TEST_F(HugePagesTest, FinalizeEndsTheWait) {
  Mapping memory;
  memory.Fill();
  HugePages pages;
  kernel.Hold(kUntilLetGo);
  pages.Add(1, {memory.start()}, kBytes);
  kernel.AwaitCollapse();
  std::thread waiter([&] { pages.Wait(); });
  std::thread stopper([&] { pages.Stop(); });
  waiter.join();
  kernel.LetGo();
  stopper.join();
  pages.Add(2, {memory.start()}, kBytes);
  EXPECT_LT(kernel.Bytes(kCollapse), kBytes) << "went on after Stop";
}

TEST_F(HugePagesTest, AreGivenUpWhereThereAreNone) {
  Mapping memory;
  memory.Fill();
  Endpoint endpoint;
  for (const int error : {ENOMEM, EBUSY}) {
    kernel.Reset();
    kernel.FailCollapsesWith(error);
    const int64_t id = endpoint.Register({memory.start()}, kBytes);
    EXPECT_EQ(endpoint.Wait().huge_bytes, 0U);
    EXPECT_EQ(kernel.Count(kCollapse), 1U);
    endpoint.Unregister(id);
  }
}

TEST_F(HugePagesTest, PagesInUseDoNotKeepOthersFromThem) {
  Mapping memory;
  memory.Fill();
  Endpoint endpoint;
  kernel.FailCollapsesWith(EAGAIN);
  endpoint.Register({memory.start()}, kBytes);
  EXPECT_EQ(endpoint.Wait().huge_bytes, 0U);
  EXPECT_EQ(kernel.Bytes(kCollapse), kBytes);
}

}  // namespace
}  // namespace datadist::testing

extern "C" int madvise(void *start, size_t length, int advice) noexcept {
  return datadist::testing::kernel.Advise(start, length, advice);
}
