// Same process: plain copies, checked and pinned on both sides through the two region tables.
#ifndef DATADIST_TRANSPORT_LOCAL_LOCAL_DATA_PATH_H_
#define DATADIST_TRANSPORT_LOCAL_LOCAL_DATA_PATH_H_

#include <memory>

#include "base/worker_pool.h"
#include "transport/transport.h"

namespace datadist {

// `self`: the cluster that the owner of `remote` sees in us.
std::unique_ptr<DataPath> MakeLocalDataPath(std::weak_ptr<RegionTable> remote, uint64_t self,
                                            std::shared_ptr<WorkerPool> pool);

}  // namespace datadist

#endif  // DATADIST_TRANSPORT_LOCAL_LOCAL_DATA_PATH_H_
