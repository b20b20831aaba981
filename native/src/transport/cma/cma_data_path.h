// Same host: process_vm_readv / process_vm_writev, truly one-sided.
//
// Whose memory it is, is proven, not believed: at link time each end writes the other's random challenge into a
// ProbeSlot of its own, and says its pid and the slot's address; the other end reads the slot through the kernel. The
// slot is read again in the same system call as the cache's stamp: after the bytes of every pull, so that a pid that
// now belongs to another process, or a link that the owner dropped, is noticed before any byte counts; and before each
// system call of a push.
#ifndef DATADIST_TRANSPORT_CMA_CMA_DATA_PATH_H_
#define DATADIST_TRANSPORT_CMA_CMA_DATA_PATH_H_

#include <sys/types.h>

#include <array>
#include <cstdint>
#include <memory>
#include <string>

#include "base/worker_pool.h"
#include "transport/transport.h"

namespace datadist {

using Challenge = std::array<uint8_t, 16>;

// Where this process stands: peers can reach one another by cma only if both strings are equal.
struct HostIdentity {
  std::string boot_id;        // /proc/sys/kernel/random/boot_id
  uint64_t pid_namespace = 0;  // inode of /proc/self/ns/pid
  int32_t pid = 0;
};
HostIdentity ThisHost();

// Holds a peer's challenge at a stable address for as long as the link lives; wiped on destruction, its memory stays
// mapped and is never reused for anything else.
class ProbeSlot {
 public:
  ProbeSlot();  // an empty slot
  ~ProbeSlot();
  ProbeSlot(const ProbeSlot &) = delete;
  ProbeSlot &operator=(const ProbeSlot &) = delete;
  void Set(const Challenge &challenge);
  uint64_t address() const;

 private:
  struct Page;
  Page *page_;
  size_t index_;
};

struct CmaPeer {
  HostIdentity host;
  uint64_t slot_addr = 0;
  Challenge challenge{};  // the one *we* chose and the peer wrote into its slot
};

// Ok when the peer's slot can be read and holds our challenge; otherwise the reason in words (LLM_LINK_FAILED).
Status ProbeCma(const CmaPeer &peer);

// Lets any process with the right uid read this one where the Yama security module would forbid it. Needed on the
// owner's side; harmless elsewhere.
void AllowCmaFromPeers();

std::unique_ptr<DataPath> MakeCmaDataPath(CmaPeer peer, PeerCalls *calls, std::shared_ptr<WorkerPool> pool);

}  // namespace datadist

#endif  // DATADIST_TRANSPORT_CMA_CMA_DATA_PATH_H_
