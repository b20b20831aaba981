// Who can read whom: host identity, probe slots, the probe itself.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <mutex>
#include <new>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/fence.h"
#include "transport/cma/cma_data_path.h"
#include "transport/cma/process_memory.h"

namespace datadist {
namespace {

using llm_datadist::LLM_LINK_FAILED;

constexpr size_t kPageBytes = 4096;
constexpr size_t kSlotsPerPage = kPageBytes / sizeof(Challenge);

}  // namespace

// A mapping of its own, so that nothing but challenges ever stands at these addresses.
struct ProbeSlot::Page {
  Challenge slots[kSlotsPerPage];
};

namespace {

// Slots that no link uses. Pages are never unmapped: a peer may read a slot at any time.
template <typename Page>
class SlotPool {
 public:
  std::pair<Page *, size_t> Take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) {
      void *memory = ::mmap(nullptr, kPageBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) {
        return {nullptr, 0};
      }
      auto *page = ::new (memory) Page{};
      for (size_t i = 0; i < kSlotsPerPage; ++i) {
        free_.emplace_back(page, i);
      }
    }
    const auto slot = free_.back();
    free_.pop_back();
    return slot;
  }
  void Give(Page *page, size_t index) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.emplace_back(page, index);
  }

 private:
  std::mutex mutex_;
  std::vector<std::pair<Page *, size_t>> free_;
};

// Outlives every static object: an endpoint may be torn down at exit.
template <typename Page>
SlotPool<Page> &Slots() {
  static auto *const pool = new SlotPool<Page>();
  return *pool;
}

std::string ReadLine(const char *path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

}  // namespace

ProbeSlot::ProbeSlot() { std::tie(page_, index_) = Slots<Page>().Take(); }

ProbeSlot::~ProbeSlot() {
  if (page_ != nullptr) {
    Set(Challenge{});
    Slots<Page>().Give(page_, index_);
  }
}

void ProbeSlot::Set(const Challenge &challenge) {
  if (page_ != nullptr) {
    page_->slots[index_] = challenge;
    FullFence();  // before anything that this thread lets a peer know next
  }
}

uint64_t ProbeSlot::address() const {
  return page_ == nullptr ? 0 : static_cast<uint64_t>(reinterpret_cast<uintptr_t>(&page_->slots[index_]));
}

HostIdentity ThisHost() {
  HostIdentity host;
  host.boot_id = ReadLine("/proc/sys/kernel/random/boot_id");
  struct stat info {};
  if (::stat("/proc/self/ns/pid", &info) == 0) {
    host.pid_namespace = info.st_ino;
  }
  host.pid = ::getpid();
  return host;
}

Status ProbeCma(const CmaPeer &peer) {
  const HostIdentity here = ThisHost();
  if (here.boot_id.empty() || here.boot_id != peer.host.boot_id) {
    return Status(LLM_LINK_FAILED, "the peer is on another host");
  }
  if (here.pid_namespace == 0 || here.pid_namespace != peer.host.pid_namespace) {
    return Status(LLM_LINK_FAILED, "the peer is in another pid namespace");
  }
  if (peer.host.pid <= 0 || peer.slot_addr == 0) {
    return Status(LLM_LINK_FAILED, "the peer offers no memory to probe");
  }
  Challenge seen{};
  IovecBatch batch;
  batch.Add(peer.slot_addr, seen.data(), seen.size());
  if (Status status = batch.Move(peer.host.pid, VmDirection::kRead); !status.ok()) {
    return Status(LLM_LINK_FAILED, "probe: " + status.text());
  }
  if (seen != peer.challenge) {
    return Status(LLM_LINK_FAILED, "process " + std::to_string(peer.host.pid) + " does not hold our challenge");
  }
  return Status::Ok();
}

void AllowCmaFromPeers() {
#ifdef PR_SET_PTRACER
  (void)::prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);  // fails where there is no Yama: nothing to allow there
#endif
}

}  // namespace datadist
