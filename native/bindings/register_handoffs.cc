#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "channel/handoff_table.h"
#include "channel/messages.h"
#include "channel/progress_reporter.h"
#include "channel_ends.h"
#include "channel_values.h"
#include "register.h"

namespace py = pybind11;

namespace datadist::bindings {
namespace {

using EntryTuple = std::tuple<std::string, uint32_t, uint32_t, uint32_t>;

std::shared_ptr<HandoffTable> ConstructTable(size_t max_handoffs) {
  Result<std::unique_ptr<HandoffTable>> table = HandoffTable::Create(max_handoffs);
  if (!table.ok()) {
    Raise(table.status());
  }
  return std::move(table).value();
}

HandoffTable::Blob ToBlob(const py::bytes &bytes) {
  const auto view = static_cast<std::string_view>(bytes);
  return HandoffTable::Blob(view.begin(), view.end());
}

void Begin(HandoffTable &self, const std::string &token, uint32_t epoch, const py::bytes &blob) {
  if (const Status status = self.Begin(FromHex(token), epoch, ToBlob(blob)); !status.ok()) {
    Raise(status);
  }
}

bool Seal(HandoffTable &self, const std::string &token, uint32_t epoch, const py::bytes &blob) {
  const Result<bool> sealed = self.Seal(FromHex(token), epoch, ToBlob(blob));
  if (!sealed.ok()) {
    Raise(sealed.status());
  }
  return sealed.value();
}

void BeginStep(ProgressReporter &self, const std::pair<py::str, uint16_t> &endpoint, const std::string &key,
               const std::vector<EntryTuple> &entries) {
  std::vector<ProgressReporter::Entry> made;
  made.reserve(entries.size());
  for (const auto &[token, epoch, before, after] : entries) {
    made.push_back({FromHex(token), epoch, before, after});
  }
  const Status status = Usable(self).BeginStep({ToBytes(endpoint.first), endpoint.second}, FromHex(key), made);
  if (!status.ok()) {
    Raise(status);
  }
}

std::shared_ptr<ProgressReporter> ConstructReporter(uint16_t content_version, uint16_t pp_rank, uint16_t tp_rank,
                                                    const std::string &auth, bool insecure) {
  if (pp_rank > kMaxRank || tp_rank > kMaxRank) {
    throw py::value_error("rank (" + std::to_string(pp_rank) + ", " + std::to_string(tp_rank) +
                          "); allowed: 0.." + std::to_string(kMaxRank));
  }
  return Made(ProgressReporter::Create(content_version, RankId{pp_rank, tp_rank}, ToTrust(auth, insecure)));
}

void RegisterTable(py::module_ &module) {
  const auto token = py::arg("token");
  py::class_<HandoffTable, std::shared_ptr<HandoffTable>>(module, "HandoffTable")
      .def(py::init(&ConstructTable), py::arg("max_handoffs") = HandoffTable::kMostLive)
      .def_property_readonly("key", [](const HandoffTable &self) { return ToHex(self.key()); })
      .def(
          "promise",
          [](HandoffTable &self, const std::string &text, const py::str &request_id) {
            return self.Promise(FromHex(text), ToBytes(request_id));
          },
          token, py::arg("request_id"))
      .def("begin", &Begin, token, py::arg("epoch"), py::arg("blob"))
      .def("seal", &Seal, token, py::arg("epoch"), py::arg("blob"))
      .def(
          "end",
          [](HandoffTable &self, const std::string &text, const py::str &reason) {
            self.End(FromHex(text), ToBytes(reason));
          },
          token, py::arg("reason"))
      .def(
          "forget",
          [](HandoffTable &self, const std::vector<std::string> &tokens) { self.Forget(ToTokens(tokens)); },
          py::arg("tokens"))
      .def(
          "is_withdrawn",
          [](const HandoffTable &self, const std::string &text) { return self.IsWithdrawn(FromHex(text)); }, token)
      .def(
          "is_awaited",
          [](const HandoffTable &self, const std::string &text) { return self.IsAwaited(FromHex(text)); }, token)
      .def("__len__", &HandoffTable::live);
}

void RegisterReporter(py::module_ &module) {
  py::class_<ProgressReporter, std::shared_ptr<ProgressReporter>>(module, "ProgressReporter",
                                                                  py::release_gil_before_calling_cpp_dtor())
      .def(py::init(&ConstructReporter), py::arg("content_version"), py::arg("pp_rank"), py::arg("tp_rank"),
           py::arg("auth") = "", py::arg("insecure") = false)
      .def("begin_step", &BeginStep, py::arg("endpoint"), py::arg("key"), py::arg("entries"))
      .def(
          "layer", [](ProgressReporter &self, size_t index) { Usable(self).Layer(index); }, py::arg("index"))
      .def("end_step", [](ProgressReporter &self) { Usable(self).EndStep(); })
      .def("__len__", [](ProgressReporter &self) { return Usable(self).size(); })
      .def("close", &Close<ProgressReporter>);
}

}  // namespace

void RegisterHandoffs(py::module_ &module) {
  RegisterTable(module);
  RegisterReporter(module);
}

}  // namespace datadist::bindings
