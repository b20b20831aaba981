#include "register.h"

// The contract of this module is vllm_datadist_connector/_native.pyi.
PYBIND11_MODULE(_native, module) {
  datadist::bindings::RegisterExit(module);
  datadist::bindings::RegisterStatus(module);
  datadist::bindings::RegisterDataDist(module);
  datadist::bindings::RegisterTransferQueue(module);
  datadist::bindings::RegisterLeases(module);
  datadist::bindings::RegisterHandoffs(module);
  datadist::bindings::RegisterRoles(module);
  datadist::bindings::RegisterChannel(module);
  datadist::bindings::RegisterKeeper(module);
  datadist::bindings::RegisterDigests(module);
  datadist::bindings::RegisterManaged(module);
}
