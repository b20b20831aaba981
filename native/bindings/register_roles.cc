#include <pybind11/stl.h>

#include <memory>

#include "channel/role_switch.h"
#include "channel_values.h"
#include "register.h"

namespace py = pybind11;

namespace datadist::bindings {

void RegisterRoles(py::module_ &module) {
  py::class_<RoleSwitch, std::shared_ptr<RoleSwitch>>(module, "RoleSwitch")
      .def(py::init([](std::shared_ptr<LeaseTable> leases, std::shared_ptr<HandoffTable> handoffs, double apply_s) {
             const auto apply = std::chrono::ceil<std::chrono::milliseconds>(FromSeconds(apply_s));
             return std::make_shared<RoleSwitch>(std::move(leases), std::move(handoffs), apply);
           }),
           py::arg("leases").none(false), py::arg("handoffs").none(false), py::arg("apply_s") = 30.0)
      .def_property_readonly("gives", [](const RoleSwitch &self) { return Gives(self.duties()); })
      .def_property_readonly("takes", [](const RoleSwitch &self) { return Takes(self.duties()); })
      .def_property_readonly("may_pull", &RoleSwitch::may_pull)
      .def_property_readonly("role", [](const RoleSwitch &self) { return NameOf(self.role()); })
      .def("set_taken", &RoleSwitch::SetTaken, py::arg("count"));
}

}  // namespace datadist::bindings
