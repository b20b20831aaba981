#include <pybind11/stl.h>

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "channel/lease_table.h"
#include "channel_values.h"
#include "named_tuple.h"
#include "register.h"

namespace py = pybind11;

namespace datadist::bindings {
namespace {

// A clock that stands still until somebody moves it: for tests, which have no time to wait for leases to run out.
class ManualClock {
 public:
  double now() const { return std::chrono::duration<double>(std::chrono::nanoseconds(now_)).count(); }
  void set_now(double seconds) { now_ = FromSeconds(seconds).count(); }
  LeaseTable::Clock::time_point Now() const { return LeaseTable::Clock::time_point(std::chrono::nanoseconds(now_)); }

 private:
  std::atomic<int64_t> now_{1'000'000'000'000};
};

std::shared_ptr<LeaseTable> ConstructLeases(double limit_s, const std::shared_ptr<ManualClock> &clock) {
  const auto limit = FromSeconds(limit_s);
  return clock == nullptr ? std::make_shared<LeaseTable>(limit)
                          : std::make_shared<LeaseTable>(limit, [clock] { return clock->Now(); });
}

py::tuple Grant(LeaseTable &self, const py::str &request_id, const std::string &prompt, const std::string &blocks,
                uint64_t num_blocks, double claim_s, double lease_s, const std::string &token) {
  const auto ticket = self.Grant(ToBytes(request_id), {FromHex(prompt), FromHex(blocks)}, num_blocks,
                                 {FromSeconds(claim_s), FromSeconds(lease_s)},
                                 token.empty() ? std::nullopt : std::optional<LeaseToken>(FromHex(token)));
  if (!ticket.ok()) {
    Raise(ticket.status());
  }
  return py::make_tuple(ToHex(ticket.value().token), ticket.value().generation);
}

const char *NameOf(LeaseTable::End why) {
  switch (why) {
    case LeaseTable::End::kReleased:
      return "released";
    case LeaseTable::End::kExpired:
      return "expired";
    case LeaseTable::End::kUnclaimed:
      return "unclaimed";
    case LeaseTable::End::kRevoked:
      return "revoked";
  }
  return "?";
}

LeaseTable::Revocable ToRevocable(const std::string &which) {
  if (which == "unclaimed") {
    return LeaseTable::Revocable::kUnclaimed;
  }
  if (which == "idle") {
    return LeaseTable::Revocable::kIdle;
  }
  if (which == "all") {
    return LeaseTable::Revocable::kAll;
  }
  throw py::value_error("which: '" + which + "', allowed: unclaimed, idle, all");
}

py::list TakeEnded(LeaseTable &self, const py::object &ended_type) {
  py::list ended;
  for (const LeaseTable::Ended &lease : self.TakeEnded()) {
    ended.append(ended_type(FromBytes(lease.request_id), NameOf(lease.why), FromBytes(lease.asked_by)));
  }
  return ended;
}

py::tuple ToTuple(const LeaseTable::Amount &amount) { return py::make_tuple(amount.leases, amount.blocks); }

py::tuple TakeRefused(LeaseTable &self, const py::object &refusal_type) {
  const LeaseTable::Refused refused = self.TakeRefused();
  py::list first;
  for (const LeaseTable::Refusal &each : refused.first) {
    first.append(refusal_type(FromBytes(each.request_id), FromBytes(each.asked_by), ReasonOf(each.verdict)));
  }
  return py::make_tuple(refused.count, first);
}

}  // namespace

void RegisterLeases(py::module_ &module) {
  const py::object ended =
      DefineNamedTuple(module, "EndedLease", {{"request_id", "str"}, {"why", "str"}, {"asked_by", "str"}});
  const py::object refusal =
      DefineNamedTuple(module, "Refusal", {{"request_id", "str"}, {"asked_by", "str"}, {"reason", "str"}});
  py::class_<ManualClock, std::shared_ptr<ManualClock>>(module, "ManualClock")
      .def(py::init())
      .def_property("now", &ManualClock::now, &ManualClock::set_now);
  py::class_<LeaseTable, std::shared_ptr<LeaseTable>>(module, "LeaseTable")
      .def(py::init(&ConstructLeases), py::arg("limit_s"), py::arg("clock") = nullptr)
      .def("grant", &Grant, py::arg("request_id"), py::arg("prompt_digest"), py::arg("blocks_digest"),
           py::arg("num_blocks"), py::arg("claim_s"), py::arg("lease_s"), py::arg("token") = "")
      .def(
          "confirm",
          [](LeaseTable &self, const std::string &token, uint64_t generation, const std::string &prompt,
             const std::string &blocks, const std::string &by) {
            return ReasonOf(self.Confirm(FromHex(token), generation, {FromHex(prompt), FromHex(blocks)}, by));
          },
          py::arg("token"), py::arg("generation"), py::arg("prompt_digest"), py::arg("blocks_digest"),
          py::arg("by") = "")
      .def(
          "renew",
          [](LeaseTable &self, const std::vector<std::string> &tokens, bool pulling, const std::string &by) {
            return FromTokens(self.Renew(ToTokens(tokens), pulling, by));
          },
          py::arg("tokens"), py::arg("pulling") = false, py::arg("by") = "")
      .def(
          "release",
          [](LeaseTable &self, const std::vector<std::string> &tokens) { self.Release(ToTokens(tokens)); },
          py::arg("tokens"))
      .def(
          "revoke",
          [](LeaseTable &self, const std::string &which, double age_s, size_t most) {
            return self.Revoke(ToRevocable(which), FromSeconds(age_s), most);
          },
          py::arg("which"), py::arg("age_s"), py::arg("most"))
      .def(
          "revoke_idle", [](LeaseTable &self, const std::string &token) { return self.RevokeIdle(FromHex(token)); },
          py::arg("token"))
      .def("changes", &LeaseTable::Changes)
      .def("take_ended", [ended](LeaseTable &self) { return TakeEnded(self, ended); })
      .def("take_refused", [refusal](LeaseTable &self) { return TakeRefused(self, refusal); })
      .def("take_served", [](LeaseTable &self) { return ToTuple(self.TakeServed()); })
      .def("held", [](const LeaseTable &self) { return ToTuple(self.held()); })
      .def("oldest_s", [](const LeaseTable &self) {
        return std::chrono::duration<double>(self.OldestAge()).count();
      });
}

}  // namespace datadist::bindings
