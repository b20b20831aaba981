#include "engine/last_error.h"

#include <cstdio>
#include <string>

#include "base/log.h"
#include "llm_datadist/llm_datadist_ext.h"

namespace datadist {
namespace {

thread_local std::string last_error;
thread_local std::string last_reason;

// Programs print the number of a status and no more: without the line nobody would know why. Those that try again and
// again, as one waits for a peer, must not fill a disk.
void LogFailure() {
  static LogBudget budget;
  if (LogEnabled(LogLevel::kError) && budget.Take()) {
    Log(LogLevel::kError, last_error);
  }
}

std::string CodeText(llm_datadist::Status code) {
  char number[16];
  std::snprintf(number, sizeof(number), "0x%08X", static_cast<unsigned>(code));
  return std::string(llm_datadist::GetStatusName(code)) + " (" + number + ")";
}

}  // namespace

llm_datadist::Status Remember(const char *call, const Status &status) {
  if (status.ok()) {
    last_error.clear();
    last_reason.clear();
  } else {
    last_reason = std::string(call) + ": " + status.text();
    last_error = std::string(call) + ": " + CodeText(status.code()) + ": " + status.text();
    LogFailure();
  }
  return status.code();
}

const char *LastReason() { return last_reason.c_str(); }

}  // namespace datadist

namespace llm_datadist {

const char *GetLastErrorText() { return datadist::last_error.c_str(); }

const char *GetStatusName(Status status) {
  switch (status) {
    case LLM_SUCCESS:
      return "LLM_SUCCESS";
    case LLM_FAILED:
      return "LLM_FAILED";
    case LLM_WAIT_PROC_TIMEOUT:
      return "LLM_WAIT_PROC_TIMEOUT";
    case LLM_KV_CACHE_NOT_EXIST:
      return "LLM_KV_CACHE_NOT_EXIST";
    case LLM_PARAM_INVALID:
      return "LLM_PARAM_INVALID";
    case LLM_NOT_YET_LINK:
      return "LLM_NOT_YET_LINK";
    case LLM_ALREADY_LINK:
      return "LLM_ALREADY_LINK";
    case LLM_LINK_FAILED:
      return "LLM_LINK_FAILED";
    case LLM_UNLINK_FAILED:
      return "LLM_UNLINK_FAILED";
    case LLM_NOTIFY_PROMPT_UNLINK_FAILED:
      return "LLM_NOTIFY_PROMPT_UNLINK_FAILED";
    case LLM_CLUSTER_NUM_EXCEED_LIMIT:
      return "LLM_CLUSTER_NUM_EXCEED_LIMIT";
    case LLM_PROCESSING_LINK:
      return "LLM_PROCESSING_LINK";
    case LLM_DEVICE_OUT_OF_MEMORY:
      return "LLM_DEVICE_OUT_OF_MEMORY";
    case LLM_EXIST_LINK:
      return "LLM_EXIST_LINK";
    case LLM_FEATURE_NOT_ENABLED:
      return "LLM_FEATURE_NOT_ENABLED";
    case LLM_TIMEOUT:
      return "LLM_TIMEOUT";
    case LLM_LINK_BUSY:
      return "LLM_LINK_BUSY";
    case LLM_OUT_OF_MEMORY:
      return "LLM_OUT_OF_MEMORY";
    default:
      return "LLM_UNKNOWN";
  }
}

}  // namespace llm_datadist
