// The status codes of LLM-DataDist under the path and the namespace in which programs for CANN find them.
#ifndef GE_LLM_ERROR_CODES_H_
#define GE_LLM_ERROR_CODES_H_

#include "llm_datadist/llm_datadist.h"

namespace ge {

using llm_datadist::LLM_ALREADY_LINK;
using llm_datadist::LLM_CLUSTER_NUM_EXCEED_LIMIT;
using llm_datadist::LLM_DEVICE_OUT_OF_MEMORY;
using llm_datadist::LLM_EXIST_LINK;
using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_FEATURE_NOT_ENABLED;
using llm_datadist::LLM_KV_CACHE_NOT_EXIST;
using llm_datadist::LLM_LINK_BUSY;
using llm_datadist::LLM_LINK_FAILED;
using llm_datadist::LLM_NOTIFY_PROMPT_UNLINK_FAILED;
using llm_datadist::LLM_NOT_YET_LINK;
using llm_datadist::LLM_OUT_OF_MEMORY;
using llm_datadist::LLM_PARAM_INVALID;
using llm_datadist::LLM_PROCESSING_LINK;
using llm_datadist::LLM_SUCCESS;
using llm_datadist::LLM_TIMEOUT;
using llm_datadist::LLM_UNLINK_FAILED;
using llm_datadist::LLM_WAIT_PROC_TIMEOUT;

}  // namespace ge

#endif  // GE_LLM_ERROR_CODES_H_
