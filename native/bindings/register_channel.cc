#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "channel/client.h"
#include "channel/server.h"
#include "channel_ends.h"
#include "channel_values.h"
#include "named_tuple.h"
#include "register.h"

namespace py = pybind11;

namespace datadist::bindings {
namespace {

using std::chrono::milliseconds;

std::shared_ptr<ChannelServer> ConstructServer(const std::string &host, uint16_t port, const py::str &engine_id,
                                               const std::string &incarnation, uint16_t content_version,
                                               std::shared_ptr<LeaseTable> leases, const std::string &auth,
                                               bool insecure, double grace_s,
                                               std::shared_ptr<HandoffTable> handoffs,
                                               std::shared_ptr<RoleSwitch> roles) {
  const Result<SocketAddress> address = SocketAddress::FromIp(host, port);
  if (!address.ok()) {
    Raise(address.status());
  }
  ChannelLimits limits;
  limits.grace = std::chrono::ceil<milliseconds>(FromSeconds(grace_s));
  return Made(ChannelServer::Create(address.value(), {ToBytes(engine_id), FromHex(incarnation), content_version},
                                    ToTrust(auth, insecure), std::move(leases), limits, std::move(handoffs),
                                    std::move(roles)));
}

void SetGeometries(ChannelServer &self, const std::map<std::pair<uint16_t, uint16_t>, py::bytes> &geometries) {
  ChannelServer::Geometries made;
  for (const auto &[rank, geometry] : geometries) {
    const std::string bytes = geometry;
    made.emplace(RankId{rank.first, rank.second}, std::vector<uint8_t>(bytes.begin(), bytes.end()));
  }
  if (const Status status = Usable(self).SetGeometries(std::move(made)); !status.ok()) {
    Raise(status);
  }
}

// A host may be any str that a client has sent: what is no address comes back as the request's failure.
uint64_t Send(ChannelClient &self, const std::pair<py::str, uint16_t> &endpoint, const ChannelRequest &request,
              double timeout_s) {
  const auto timeout = std::chrono::ceil<milliseconds>(FromSeconds(timeout_s));
  return Usable(self).Send(ToBytes(endpoint.first), endpoint.second, request, timeout);
}

py::bytes ToPython(const std::vector<uint8_t> &bytes) {
  return py::bytes(reinterpret_cast<const char *>(bytes.data()), bytes.size());
}

const char *NameOf(HandoffState state) {
  switch (state) {
    case HandoffState::kUnknown:
      return "unknown";
    case HandoffState::kPromised:
      return "promised";
    case HandoffState::kBegun:
      return "begun";
    case HandoffState::kSealed:
      return "sealed";
    case HandoffState::kEnded:
      return "ended";
  }
  return "?";
}

// More patience than a message may have is that.
uint32_t ToPatience(double seconds) {
  const auto patience = std::chrono::ceil<milliseconds>(FromSeconds(seconds));
  return static_cast<uint32_t>(std::min(patience, milliseconds(kMaxPatienceMs)).count());
}

Await ToAwait(const std::string &token, const std::optional<std::pair<uint16_t, uint16_t>> &rank, uint32_t seen_version,
              uint64_t seen_stamp, double patience_s, uint64_t offer_id) {
  Await await{FromHex(token), {}, seen_version, seen_stamp, ToPatience(patience_s), offer_id};
  if (rank.has_value()) {
    await.rank = RankId{rank->first, rank->second};
  }
  return await;
}

constexpr std::array<const char *, kDeliveryStates> kDeliveryNames = {"none", "offered", "running", "done", "failed"};

const char *NameOf(DeliveryState state) { return kDeliveryNames[static_cast<size_t>(state)]; }

double ToSeconds(uint64_t micros) {
  return std::chrono::duration<double>(std::chrono::microseconds(micros)).count();
}

std::vector<uint8_t> ToOffered(const py::bytes &bytes) {
  const std::string_view view = bytes;
  if (view.size() > kMaxOffer) {
    throw py::value_error("blob of " + std::to_string(view.size()) + " bytes; allowed: " + std::to_string(kMaxOffer));
  }
  return {view.begin(), view.end()};
}

uint64_t SendDelivery(ChannelClient &self, const std::pair<py::str, uint16_t> &server, const std::string &key,
                      const std::pair<uint16_t, uint16_t> &rank, const std::string &token, uint64_t offer_id,
                      const std::string &state, uint32_t epoch, uint64_t num_bytes, uint64_t early_bytes, double run_s,
                      const py::str &reason, double timeout_s) {
  const auto *const name = std::find(kDeliveryNames.begin(), kDeliveryNames.end(), state);
  if (name == kDeliveryNames.end()) {
    throw py::value_error("state: " + state + "; allowed: none, offered, running, done, failed");
  }
  const auto run = std::chrono::duration_cast<std::chrono::microseconds>(FromSeconds(run_s));
  Deliver deliver{FromHex(key), {rank.first, rank.second}, FromHex(token), offer_id, {}};
  deliver.delivery = {static_cast<DeliveryState>(name - kDeliveryNames.begin()), epoch, num_bytes, early_bytes,
                      static_cast<uint64_t>(run.count()), ToBytes(reason)};
  return Send(self, server, deliver, timeout_s);
}

constexpr std::array<const char *, kSwitchStates> kSwitchNames = {"refused", "draining", "applying", "done"};

const char *NameOf(SwitchState state) { return kSwitchNames[static_cast<size_t>(state)]; }

uint64_t SendSwitch(ChannelClient &self, const std::pair<py::str, uint16_t> &server, const std::string &wish_id,
                    const std::string &role, double drain_s, double patience_s, double timeout_s) {
  InstanceRole wanted = InstanceRole::kNone;
  for (const InstanceRole each : {InstanceRole::kPrefill, InstanceRole::kDecode, InstanceRole::kBoth}) {
    wanted = role == NameOf(each) ? each : wanted;
  }
  if (wanted == InstanceRole::kNone) {
    throw py::value_error("role: " + role + "; allowed: prefill, decode, both");
  }
  const auto drain = std::min(std::chrono::ceil<milliseconds>(FromSeconds(drain_s)), milliseconds(kMaxDrainMs));
  const Switch wish{FromHex(wish_id), wanted, static_cast<uint32_t>(drain.count()), ToPatience(patience_s)};
  return Send(self, server, wish, timeout_s);
}

// The Python class of each answer.
struct AnswerTypes {
  py::object answer;
  py::object rank;
  py::object renewed;
  py::object confirmed;
  py::object released;
  py::object news;
  py::object reported;
  py::object offered;
  py::object watched;
  py::object switched;
  py::object refused;
};

struct ToResponse {
  const AnswerTypes &types;
  py::object operator()(const NoAnswer &) const { return py::none(); }
  py::object operator()(const RankAnswer &answer) const {
    if (!answer.status.ok()) {
      return types.refused(answer.status.text());
    }
    return types.rank(ToPython(answer.geometry));
  }
  py::object operator()(const Renewed &answer) const { return types.renewed(FromTokens(answer.gone)); }
  py::object operator()(const Confirmed &answer) const {
    return types.confirmed(answer.verdict == LeaseVerdict::kHeld, ReasonOf(answer.verdict));
  }
  py::object operator()(const Released &) const { return types.released(); }
  py::object operator()(const HandoffNews &news) const {
    const ProgressMark &mark = news.mark;
    return types.news(NameOf(news.state), news.epoch, news.version, news.stamp,
                      news.blob.has_value() ? py::object(ToPython(*news.blob)) : py::none(), mark.epoch, mark.base,
                      mark.next, ToPython(mark.layers), news.reason, NameOf(news.delivery.state), news.delivery.epoch,
                      news.delivery.bytes, news.delivery.early_bytes, ToSeconds(news.delivery.run_us),
                      news.delivery.reason);
  }
  py::object operator()(const Reported &) const { return types.reported(); }
  py::object operator()(const Offered &answer) const {
    return answer.status.ok() ? types.offered() : types.refused(answer.status.text());
  }
  py::object operator()(const Watched &watched) const {
    const RoleOrder order = watched.role.value_or(RoleOrder{});
    return types.watched(watched.number, ToHex(watched.token), watched.offer_id, ToPython(watched.blob),
                         watched.role.has_value() ? NameOf(order.role) : "", order.attempt, order.limit_ms / 1e3);
  }
  py::object operator()(const SwitchStatus &status) const {
    return types.switched(NameOf(status.state), NameOf(status.role), status.leases, status.handoffs, status.taken,
                          status.ranks, status.reason);
  }
};

py::list Take(ChannelClient &self, const AnswerTypes &types) {
  py::list answers;
  for (const ChannelAnswer &each : Usable(self).Take()) {
    const auto *const none = std::get_if<NoAnswer>(&each.answer);
    answers.append(types.answer(each.id, std::visit(ToResponse{types}, each.answer),
                                none != nullptr ? none->error : std::string(), none != nullptr && none->timed_out));
  }
  return answers;
}

void RegisterServer(py::module_ &module) {
  py::class_<ChannelServer, std::shared_ptr<ChannelServer>>(module, "ChannelServer",
                                                            py::release_gil_before_calling_cpp_dtor())
      .def(py::init(&ConstructServer), py::arg("host"), py::arg("port"), py::arg("engine_id"), py::arg("incarnation"),
           py::arg("content_version"), py::arg("leases"), py::arg("auth") = "", py::arg("insecure") = false,
           py::arg("grace_s") = std::chrono::duration<double>(ChannelLimits().grace).count(),
           py::arg("handoffs") = nullptr, py::arg("roles") = nullptr)
      .def_property_readonly("port", &ChannelServer::port)
      .def("set_geometries", &SetGeometries, py::arg("geometries"))
      .def("take_left_askers", [](ChannelServer &self) { return Usable(self).TakeLeftAskers(); })
      .def("close", &Close<ChannelServer>);
}

void RegisterClient(py::module_ &module, const AnswerTypes &types) {
  const auto endpoint = py::arg("endpoint");
  const auto timeout = py::arg("timeout_s");
  py::class_<ChannelClient, std::shared_ptr<ChannelClient>>(module, "ChannelClient",
                                                            py::release_gil_before_calling_cpp_dtor())
      .def(py::init([](uint16_t content_version, const std::string &auth, bool insecure, size_t max_servers,
                       double idle_s) {
             const ChannelClientLimits limits{max_servers, std::chrono::ceil<milliseconds>(FromSeconds(idle_s))};
             return Made(ChannelClient::Create(content_version, ToTrust(auth, insecure), limits));
           }),
           py::arg("content_version"), py::arg("auth") = "", py::arg("insecure") = false,
           py::arg("max_servers") = ChannelClientLimits().servers,
           py::arg("idle_s") = std::chrono::duration<double>(ChannelClientLimits().idle).count())
      .def(
          "describe_rank",
          [](ChannelClient &self, const std::pair<py::str, uint16_t> &server, const py::str &engine_id,
             const std::string &incarnation, uint16_t pp_rank, uint16_t tp_rank, double timeout_s, uint64_t asker) {
            return Send(self, server,
                        DescribeRank{ToBytes(engine_id), FromHex(incarnation), {pp_rank, tp_rank}, asker}, timeout_s);
          },
          endpoint, py::arg("engine_id"), py::arg("incarnation"), py::arg("pp_rank"), py::arg("tp_rank"), timeout,
          py::arg("asker") = 0)
      .def(
          "renew",
          [](ChannelClient &self, const std::pair<py::str, uint16_t> &server, const std::vector<std::string> &tokens,
             double timeout_s, bool pulling) {
            return Send(self, server, Renew{ToTokens(tokens), pulling}, timeout_s);
          },
          endpoint, py::arg("tokens"), timeout, py::arg("pulling") = false)
      .def(
          "release",
          [](ChannelClient &self, const std::pair<py::str, uint16_t> &server, const std::vector<std::string> &tokens,
             double timeout_s) { return Send(self, server, Release{ToTokens(tokens)}, timeout_s); },
          endpoint, py::arg("tokens"), timeout)
      .def(
          "confirm",
          [](ChannelClient &self, const std::pair<py::str, uint16_t> &server, const std::string &token,
             uint64_t generation, const std::string &prompt, const std::string &blocks, double timeout_s) {
            return Send(self, server, Confirm{FromHex(token), generation, {FromHex(prompt), FromHex(blocks)}},
                        timeout_s);
          },
          endpoint, py::arg("token"), py::arg("generation"), py::arg("prompt_digest"), py::arg("blocks_digest"),
          timeout)
      .def(
          "await_handoff",
          [](ChannelClient &self, const std::pair<py::str, uint16_t> &server, const std::string &token,
             const std::optional<std::pair<uint16_t, uint16_t>> &rank, uint32_t seen_version, uint64_t seen_stamp,
             double patience_s, double timeout_s, uint64_t offer_id) {
            return Send(self, server, ToAwait(token, rank, seen_version, seen_stamp, patience_s, offer_id), timeout_s);
          },
          endpoint, py::arg("token"), py::arg("rank"), py::arg("seen_version"), py::arg("seen_stamp"),
          py::arg("patience_s"), timeout, py::arg("offer_id") = 0)
      .def(
          "offer",
          [](ChannelClient &self, const std::pair<py::str, uint16_t> &server, const std::string &token,
             const std::pair<uint16_t, uint16_t> &rank, uint64_t offer_id, const py::bytes &blob, double timeout_s) {
            return Send(self, server, Offer{FromHex(token), {rank.first, rank.second}, offer_id, ToOffered(blob)}, timeout_s);
          },
          endpoint, py::arg("token"), py::arg("rank"), py::arg("offer_id"), py::arg("blob"), timeout)
      .def(
          "watch",
          [](ChannelClient &self, const std::pair<py::str, uint16_t> &server, const std::string &key,
             const std::pair<uint16_t, uint16_t> &rank, uint64_t seen, double patience_s, double timeout_s) {
            return Send(self, server, Watch{FromHex(key), {rank.first, rank.second}, seen, ToPatience(patience_s)},
                        timeout_s);
          },
          endpoint, py::arg("key"), py::arg("rank"), py::arg("seen"), py::arg("patience_s"), timeout)
      .def("deliver", &SendDelivery, endpoint, py::arg("key"), py::arg("rank"), py::arg("token"), py::arg("offer_id"),
           py::arg("state"), py::arg("epoch"), py::arg("num_bytes"), py::arg("early_bytes"), py::arg("run_s"),
           py::arg("reason"), timeout)
      .def(
          "declare",
          [](ChannelClient &self, const std::pair<py::str, uint16_t> &server, const std::string &key,
             const std::pair<uint16_t, uint16_t> &rank, uint64_t attempt, const py::str &reason, double timeout_s) {
            return Send(self, server, Declare{FromHex(key), {rank.first, rank.second}, attempt, ToBytes(reason)},
                        timeout_s);
          },
          endpoint, py::arg("key"), py::arg("rank"), py::arg("attempt"), py::arg("reason"), timeout)
      .def("switch_role", &SendSwitch, endpoint, py::arg("wish_id"), py::arg("role"), py::arg("drain_s"),
           py::arg("patience_s"), timeout)
      .def("take", [types](ChannelClient &self) { return Take(self, types); })
      .def("fileno", [](ChannelClient &self) { return Usable(self).event_fd(); })
      .def("close", &Close<ChannelClient>);
}

}  // namespace

void RegisterChannel(py::module_ &module) {
  const AnswerTypes types{
      DefineNamedTuple(module, "ChannelAnswer",
                       {{"id", "int"}, {"response", "object"}, {"error", "str"}, {"timed_out", "bool"}}),
      DefineNamedTuple(module, "RankDescription", {{"geometry", "bytes"}}),
      DefineNamedTuple(module, "Renewed", {{"gone", "tuple"}}),
      DefineNamedTuple(module, "Confirmed", {{"held", "bool"}, {"reason", "str"}}),
      DefineNamedTuple(module, "Released", {}),
      DefineNamedTuple(module, "HandoffNews",
                       {{"state", "str"},
                        {"epoch", "int"},
                        {"version", "int"},
                        {"stamp", "int"},
                        {"blob", "object"},
                        {"mark_epoch", "int"},
                        {"base", "int"},
                        {"next", "int"},
                        {"layers", "bytes"},
                        {"reason", "str"},
                        {"delivery", "str"},
                        {"delivery_epoch", "int"},
                        {"num_bytes", "int"},
                        {"early_bytes", "int"},
                        {"run_s", "float"},
                        {"delivery_reason", "str"}}),
      DefineNamedTuple(module, "Reported", {}),
      DefineNamedTuple(module, "Offered", {}),
      DefineNamedTuple(module, "Watched",
                       {{"number", "int"},
                        {"token", "str"},
                        {"offer_id", "int"},
                        {"blob", "bytes"},
                        {"role", "str"},
                        {"attempt", "int"},
                        {"limit_s", "float"}}),
      DefineNamedTuple(module, "Switched",
                       {{"state", "str"},
                        {"role", "str"},
                        {"leases", "int"},
                        {"handoffs", "int"},
                        {"taken", "int"},
                        {"ranks", "int"},
                        {"reason", "str"}}),
      DefineNamedTuple(module, "Refused", {{"reason", "str"}}),
  };
  module.attr("MAX_LEASES_PER_MESSAGE") = kMaxLeasesPerMessage;
  RegisterServer(module);
  RegisterClient(module, types);
}

}  // namespace datadist::bindings
