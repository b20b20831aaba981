// Another process on this host: its memory is read with process_vm_readv, truly one-sided. Nobody writes into another
// process: a push asks the owner of the memory to read (PeerCalls), so that the owner knows when the writing has ended.
//
// Whose memory it is, the kernel says: it named the process at the other end of the control connection (PeerProcess).
// Behind the bytes of every pull the generation of the cache is read in the same system call, and then looked whether
// the process still lives: so a cache that the owner dropped, and a pid that is another's, are noticed before any byte
// counts.
#ifndef DATADIST_TRANSPORT_CMA_CMA_DATA_PATH_H_
#define DATADIST_TRANSPORT_CMA_CMA_DATA_PATH_H_

#include <memory>

#include "base/peer_process.h"
#include "base/worker_pool.h"
#include "transport/transport.h"

namespace datadist {

// Ok when the kernel lets us read that process; otherwise the reason in words (LLM_LINK_FAILED). Touches no memory of
// the peer, and does not block.
Status ProbeCma(const PeerProcess &process);

// Lets any process with the right uid read this one where the Yama security module would forbid it. Needed on the
// owner's side; harmless elsewhere.
void AllowCmaFromPeers();

std::unique_ptr<DataPath> MakeCmaDataPath(std::shared_ptr<const PeerProcess> process, PeerCalls *calls,
                                          std::shared_ptr<WorkerPool> pool);

}  // namespace datadist

#endif  // DATADIST_TRANSPORT_CMA_CMA_DATA_PATH_H_
