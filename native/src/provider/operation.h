// What a TransferQueue can run: the arguments of one blocking call of a Provider.
#ifndef DATADIST_PROVIDER_OPERATION_H_
#define DATADIST_PROVIDER_OPERATION_H_

#include <cstdint>
#include <variant>

#include "base/status.h"
#include "provider/provider.h"

namespace datadist {

struct PullBlocksOp {
  BlocksTransfer transfer;
};
struct PushBlocksOp {
  BlocksTransfer transfer;
};
struct LinkOp {
  llm_datadist::ClusterInfo cluster{};
  int32_t timeout_ms = 0;
};
struct UnlinkOp {
  llm_datadist::ClusterInfo cluster{};
  int32_t timeout_ms = 0;
  bool force = false;
};
// Completes with `status` when its turn comes: arguments that were found wrong before they could be submitted are
// reported where all other results are.
struct RefusedOp {
  uint64_t cluster_id = 0;
  Status status;
};
using Operation = std::variant<PullBlocksOp, PushBlocksOp, LinkOp, UnlinkOp, RefusedOp>;

}  // namespace datadist

#endif  // DATADIST_PROVIDER_OPERATION_H_
