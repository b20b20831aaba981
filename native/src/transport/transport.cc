#include "transport/transport.h"

#include "base/checked.h"

namespace datadist {

Result<uint64_t> TotalBytes(const TransferOp &op) {
  const Status overflow(llm_datadist::LLM_PARAM_INVALID, "the size of the transfer exceeds 64 bits");
  uint64_t per_tensor = 0;
  for (const Run &run : op.runs) {
    const auto sum = CheckedAdd(per_tensor, run.length);
    if (!sum) {
      return overflow;
    }
    per_tensor = *sum;
  }
  const auto total = CheckedMul(per_tensor, op.tensor_count);
  if (!total) {
    return overflow;
  }
  return *total;
}

}  // namespace datadist
