#include <pybind11/stl.h>

#include <chrono>
#include <memory>
#include <string>
#include <utility>

#include "channel/lease_keeper.h"
#include "channel_ends.h"
#include "channel_values.h"
#include "register.h"

namespace py = pybind11;

namespace datadist::bindings {
namespace {

using std::chrono::milliseconds;

std::shared_ptr<LeaseKeeper> ConstructKeeper(uint16_t content_version, double answer_timeout_s, const std::string &auth,
                                             bool insecure, size_t max_leases, double news_s, double release_retry_s,
                                             double release_after_s) {
  const LeaseKeeperLimits limits{max_leases, std::chrono::ceil<milliseconds>(FromSeconds(news_s)),
                                 std::chrono::ceil<milliseconds>(FromSeconds(release_retry_s)),
                                 std::chrono::ceil<milliseconds>(FromSeconds(release_after_s))};
  return Made(LeaseKeeper::Create(content_version, ToTrust(auth, insecure),
                                  std::chrono::ceil<milliseconds>(FromSeconds(answer_timeout_s)), limits));
}

// A host may be any str that a client has sent: one that is no address answers nothing.
bool Hold(LeaseKeeper &self, const std::pair<py::str, uint16_t> &endpoint, const std::string &token, double lease_s,
          bool is_news) {
  return Usable(self).Hold({ToBytes(endpoint.first), endpoint.second}, FromHex(token), FromSeconds(lease_s), is_news);
}

py::object Holds(LeaseKeeper &self, const std::string &token) {
  const LeaseKeeper::Standing standing = Usable(self).StandingOf(FromHex(token));
  if (standing == LeaseKeeper::Standing::kNotKnown) {
    return py::none();
  }
  return py::bool_(standing == LeaseKeeper::Standing::kStands);
}

double Seconds(milliseconds duration) { return std::chrono::duration<double>(duration).count(); }

}  // namespace

void RegisterKeeper(py::module_ &module) {
  const LeaseKeeperLimits limits;
  const auto token = py::arg("token");
  py::class_<LeaseKeeper, std::shared_ptr<LeaseKeeper>>(module, "LeaseKeeper", py::release_gil_before_calling_cpp_dtor())
      .def(py::init(&ConstructKeeper), py::arg("content_version"), py::arg("answer_timeout_s"), py::arg("auth") = "",
           py::arg("insecure") = false, py::arg("max_leases") = limits.leases, py::arg("news_s") = Seconds(limits.news),
           py::arg("release_retry_s") = Seconds(limits.release_retry),
           py::arg("release_after_s") = Seconds(limits.release_after))
      .def("hold", &Hold, py::arg("endpoint"), token, py::arg("lease_s"), py::arg("is_news") = true)
      .def("holds", &Holds, token)
      .def(
          "pulls",
          [](LeaseKeeper &self, const std::string &text, double at_most_s) {
            Usable(self).Pulls(FromHex(text), FromSeconds(at_most_s));
          },
          token, py::arg("at_most_s"))
      .def(
          "lose", [](LeaseKeeper &self, const std::string &text) { Usable(self).Lose(FromHex(text)); }, token)
      .def(
          "release", [](LeaseKeeper &self, const std::string &text) { Usable(self).Release(FromHex(text)); }, token)
      .def("__len__", [](LeaseKeeper &self) { return Usable(self).size(); })
      .def("close", &Close<LeaseKeeper>);
}

}  // namespace datadist::bindings
