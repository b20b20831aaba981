// The parts of the extension module, in the order in which module.cc adds them.
#ifndef DATADIST_BINDINGS_REGISTER_H_
#define DATADIST_BINDINGS_REGISTER_H_

#include <pybind11/pybind11.h>

namespace datadist::bindings {

void RegisterExit(pybind11::module_ &module);
void RegisterStatus(pybind11::module_ &module);
void RegisterDataDist(pybind11::module_ &module);
void RegisterTransferQueue(pybind11::module_ &module);
void RegisterLeases(pybind11::module_ &module);
void RegisterHandoffs(pybind11::module_ &module);
void RegisterRoles(pybind11::module_ &module);
void RegisterChannel(pybind11::module_ &module);
void RegisterKeeper(pybind11::module_ &module);
void RegisterDigests(pybind11::module_ &module);
void RegisterManaged(pybind11::module_ &module);

}  // namespace datadist::bindings

#endif  // DATADIST_BINDINGS_REGISTER_H_
