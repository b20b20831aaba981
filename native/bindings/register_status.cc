#include <string>

#include "calls.h"
#include "llm_datadist/llm_datadist_ext.h"
#include "register.h"

namespace py = pybind11;

namespace datadist::bindings {

void RegisterStatus(py::module_ &module) {
  struct Code {
    const char *name;
    llm_datadist::Status value;
  };
  static constexpr Code kCodes[] = {
      {"LLM_SUCCESS", llm_datadist::LLM_SUCCESS},
      {"LLM_FAILED", llm_datadist::LLM_FAILED},
      {"LLM_WAIT_PROC_TIMEOUT", llm_datadist::LLM_WAIT_PROC_TIMEOUT},
      {"LLM_KV_CACHE_NOT_EXIST", llm_datadist::LLM_KV_CACHE_NOT_EXIST},
      {"LLM_PARAM_INVALID", llm_datadist::LLM_PARAM_INVALID},
      {"LLM_NOT_YET_LINK", llm_datadist::LLM_NOT_YET_LINK},
      {"LLM_ALREADY_LINK", llm_datadist::LLM_ALREADY_LINK},
      {"LLM_LINK_FAILED", llm_datadist::LLM_LINK_FAILED},
      {"LLM_UNLINK_FAILED", llm_datadist::LLM_UNLINK_FAILED},
      {"LLM_NOTIFY_PROMPT_UNLINK_FAILED", llm_datadist::LLM_NOTIFY_PROMPT_UNLINK_FAILED},
      {"LLM_CLUSTER_NUM_EXCEED_LIMIT", llm_datadist::LLM_CLUSTER_NUM_EXCEED_LIMIT},
      {"LLM_PROCESSING_LINK", llm_datadist::LLM_PROCESSING_LINK},
      {"LLM_DEVICE_OUT_OF_MEMORY", llm_datadist::LLM_DEVICE_OUT_OF_MEMORY},
      {"LLM_EXIST_LINK", llm_datadist::LLM_EXIST_LINK},
      {"LLM_FEATURE_NOT_ENABLED", llm_datadist::LLM_FEATURE_NOT_ENABLED},
      {"LLM_TIMEOUT", llm_datadist::LLM_TIMEOUT},
      {"LLM_LINK_BUSY", llm_datadist::LLM_LINK_BUSY},
      {"LLM_OUT_OF_MEMORY", llm_datadist::LLM_OUT_OF_MEMORY},
  };
  for (const Code &code : kCodes) {
    module.attr(code.name) = code.value;
  }
  module.def("last_error", &LastError);
  module.def("status_name", [](llm_datadist::Status status) { return llm_datadist::GetStatusName(status); },
             py::arg("status"));
}

}  // namespace datadist::bindings
