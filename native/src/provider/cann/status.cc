#include "provider/cann/status.h"

#include <cstdio>

#include "llm_datadist/llm_datadist_ext.h"

namespace datadist::cann {
namespace {

using namespace llm_datadist;  // the codes, which every line here names

constexpr Code kDeviceMemoryError = 507053;
constexpr Code kSuspectRemote = 507057;

std::string Name(Code code) {
  switch (code) {
    case kDeviceMemoryError:
      return "ACL_ERROR_RT_DEVICE_MEM_ERROR (507053)";
    case kSuspectRemote:
      return "ACL_ERROR_RT_SUSPECT_REMOTE_ERROR (507057)";
    default: {
      char number[16];
      std::snprintf(number, sizeof(number), "0x%08X", code);
      return std::string(GetStatusName(code)) + " (" + number + ")";
    }
  }
}

constexpr char kLogs[] = "the reason is in CANN's log (~/ascend/log, or on stdout with ASCEND_SLOG_PRINT_TO_STDOUT=1)";

std::string LinkAdvice(Code code) {
  switch (code) {
    case LLM_PARAM_INVALID:
      return "one IPv4 address per side, the device_id of llm.LocalCommRes is the physical one of this device, and its "
             "version is that of the peer's";
    case LLM_LINK_FAILED:
      return "is the peer up and listening there? hccn_tool -i N -link -g and -ping reach the peer's device, "
             "hccn_tool -i N -tls -g says the same on both ends, /etc/hccn.conf is mounted, and a device has room for "
             "the link (512)";
    case LLM_ALREADY_LINK:
      return "it is to be unlinked by force first";
    case LLM_TIMEOUT:
      return "the peer did not answer in time: it may be linking to this end at this moment, or HCCL_CONNECT_TIMEOUT "
             "is shorter";
    case LLM_UNLINK_FAILED:
      return "the peer cannot be reached; unlink by force, there as well";
    case LLM_CLUSTER_NUM_EXCEED_LIMIT:
      return "at most 16 clusters per call";
    default:
      return "";
  }
}

std::string TransferAdvice(Code code) {
  switch (code) {
    case LLM_PARAM_INVALID:
      return "blocks, rows, layers or tensors are out of the range of the caches here or there";
    case LLM_KV_CACHE_NOT_EXIST:
      return "the cache is unknown here or there; what is registered after a link was made is unknown over it: link "
             "anew";
    case LLM_NOT_YET_LINK:
      return "link first";
    case LLM_TIMEOUT:
      return "the link cannot be used any more, and what was under way may still be written until it is unlinked by "
             "force; if the peer lives, llm.SyncKvCacheWaitTime is shorter than the retransmissions of "
             "HCCL_RDMA_TIMEOUT and HCCL_RDMA_RETRY_CNT";
    default:
      return "";
  }
}

std::string GeneralAdvice(Code code) {
  switch (code) {
    case LLM_FEATURE_NOT_ENABLED:
      return "this library cannot do it: for a registration, it is that of the V1 API";
    case LLM_EXIST_LINK:
      return "unlink all clusters first";
    case LLM_DEVICE_OUT_OF_MEMORY:
    case LLM_OUT_OF_MEMORY:
      return "links and registrations take memory of the device beside the KV cache: see that the cache leaves room";
    case kDeviceMemoryError:
      return "the memory of the device has a fault: see npu-smi info -t ecc, and restart the process";
    case kSuspectRemote:
      return "the peer's device or its memory has failed: unlink by force and link anew";
    default:
      return kLogs;
  }
}

}  // namespace

Status Explain(CallKind kind, Code code, const std::string &about) {
  if (code == LLM_SUCCESS) {
    return Status::Ok();
  }
  std::string advice = kind == CallKind::kLink       ? LinkAdvice(code)
                       : kind == CallKind::kTransfer ? TransferAdvice(code)
                                                     : "";
  if (advice.empty()) {
    advice = GeneralAdvice(code);
  }
  return Status(code, (about.empty() ? "" : about + ": ") + "CANN answered " + Name(code) + ": " + advice);
}

}  // namespace datadist::cann
