#include "channel/server.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <optional>
#include <set>
#include <utility>

#include "base/log.h"
#include "channel/askers.h"
#include "base/hmac.h"
#include "channel/frame_connection.h"
#include "channel/parked_awaits.h"
#include "control/opening.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_LINK_FAILED;
using llm_datadist::LLM_NOT_YET_LINK;
using llm_datadist::LLM_PARAM_INVALID;
using TimePoint = EventLoop::Clock::time_point;

constexpr TypeSet kRequests(MessageType::kDescribeRank, MessageType::kRenew, MessageType::kConfirm,
                            MessageType::kRelease, MessageType::kAwait, MessageType::kReport);
constexpr size_t kRanksNamed = 64;

std::string RankText(const RankId &rank) {
  return "(" + std::to_string(rank.pp_rank) + ", " + std::to_string(rank.tp_rank) + ")";
}

std::vector<LeaseToken> Without(std::vector<LeaseToken> tokens, const std::vector<LeaseToken> &taken) {
  const std::set<LeaseToken> gone(taken.begin(), taken.end());
  tokens.erase(std::remove_if(tokens.begin(), tokens.end(), [&](const auto &token) { return gone.count(token) > 0; }),
               tokens.end());
  return tokens;
}

std::string NoSuchRank(const RankId &asked, const ChannelServer::Geometries &geometries) {
  std::string there;
  size_t named = 0;
  for (const auto &[rank, geometry] : geometries) {
    if (++named > kRanksNamed) {
      break;
    }
    there += (there.empty() ? "" : ", ") + RankText(rank);
  }
  return "no worker (pp, tp) = " + RankText(asked) + "; there are [" + there + "]";
}

// Each guest has a descriptor: at most half of those that the process may have, or the rest of it would get none.
ChannelLimits WithinDescriptors(const ChannelLimits &limits) {
  ChannelLimits within = limits;
  rlimit descriptors{};
  if (::getrlimit(RLIMIT_NOFILE, &descriptors) == 0) {
    within.guests = std::max<size_t>(1, std::min<size_t>(within.guests, descriptors.rlim_cur / 2));
  }
  return within;
}

}  // namespace

class ChannelServer::State : public HandoffListener, public std::enable_shared_from_this<State> {
 public:
  State(Grantor grantor, Trust trust, std::shared_ptr<LeaseTable> leases, std::shared_ptr<HandoffTable> handoffs,
        const ChannelLimits &limits)
      : grantor_(std::move(grantor)),
        trust_(std::move(trust)),
        leases_(std::move(leases)),
        handoffs_(std::move(handoffs)),
        limits_(WithinDescriptors(limits)),
        askers_(limits.grace) {}

  Status Start(Listeners listeners);
  void Close();
  void SetGeometries(Geometries geometries) {
    const std::lock_guard<std::mutex> lock(mutex_);
    geometries_ = std::move(geometries);
  }
  bool in_forked_child() const { return ::getpid() != pid_; }
  std::vector<uint64_t> TakeLeftAskers() { return askers_.TakeLeft(EventLoop::Clock::now()); }
  void OnHandoffNews(const LeaseToken &token) override;

 private:
  class Greeter;
  class Guest;
  Status CheckGreeting(const std::vector<uint8_t> &body) const;
  void WelcomeOnLoop(Visit &visit);
  void MakeRoomOnLoop();
  void RemoveOnLoop(uint64_t id) { guests_.erase(id); }
  void SweepOnLoop();
  void EndUnreadOnLoop();
  RankAnswer DescribeOnLoop(const DescribeRank &asked);
  std::vector<LeaseToken> RenewOnLoop(const Renew &renew, const std::string &by);
  void ReleaseOnLoop(const Release &release);
  Status AwaitOnLoop(uint64_t guest, const Frame &frame);
  void AnswerAwaitOnLoop(uint64_t guest, uint32_t seq, const HandoffNews &news);

  const Grantor grantor_;
  const Trust trust_;
  const std::shared_ptr<LeaseTable> leases_;
  const std::shared_ptr<HandoffTable> handoffs_;
  const ChannelLimits limits_;
  const pid_t pid_ = ::getpid();
  const std::shared_ptr<EventLoop> loop_ = std::make_shared<EventLoop>();

  Askers askers_;
  std::mutex close_mutex_;
  std::mutex mutex_;
  Geometries geometries_;         // guarded by mutex_
  std::vector<LeaseToken> news_;  // guarded by mutex_; of hand-offs, and the loop has been told that there is any

  // Owned by the loop thread.
  std::shared_ptr<FrontDoor> door_;
  uint64_t last_id_ = 0;
  ParkedAwaits awaits_{*loop_, *handoffs_, [this](uint64_t guest, uint32_t seq, const HandoffNews &news) {
                         AnswerAwaitOnLoop(guest, seq, news);
                       }};
  std::map<uint64_t, std::unique_ptr<Guest>> guests_;
  uint64_t sweep_timer_ = 0;
  LogBudget log_budget_;
};

// Speaks for a connection at the door, which says CHANNEL or leaves.
class ChannelServer::State::Greeter : public Visitor {
 public:
  explicit Greeter(std::shared_ptr<State> server) : server_(std::move(server)) {}
  TypeSet legal() const override { return TypeSet(MessageType::kChannel); }
  bool greeted() const override { return false; }
  Status OnFrameOnLoop(const Frame &frame, Visit &visit) override {
    if (const Status status = server_->CheckGreeting(frame.body); !status.ok()) {
      return visit.Reject(frame.seq, status);
    }
    if (const Status sent = visit.Send(MessageType::kChannelReady, frame.seq, {}); !sent.ok()) {
      return sent;
    }
    server_->WelcomeOnLoop(visit);
    return Status::Ok();
  }

 private:
  const std::shared_ptr<State> server_;
};

// One connection that was greeted.
class ChannelServer::State::Guest : public FrameConnection::Handler {
 public:
  Guest(State &server, uint64_t id, Caller caller, FrameSocket socket)
      : server_(server),
        id_(id),
        caller_(std::move(caller)),
        connection_(FrameConnection::OpenOnLoop(*server.loop_, std::move(socket),
                                                FrameConnection::Reads::kWhenAllIsSent, this)) {}
  ~Guest() override {
    connection_->CloseOnLoop();
    server_.awaits_.DropOnLoop(id_);
    server_.askers_.Left(asker_, EventLoop::Clock::now());
  }
  Guest(const Guest &) = delete;
  Guest &operator=(const Guest &) = delete;

  const std::string &source() const { return caller_.source; }
  size_t unsent() const { return connection_->unsent(); }
  std::optional<TimePoint> stuck_since() const { return connection_->stuck_since(); }
  TimePoint last_request() const { return last_request_; }

  // May end guests, also this one.
  void SendOnLoop(MessageType type, uint32_t seq, const std::vector<uint8_t> &body) {
    connection_->SendOnLoop(type, seq, body);
    if (unsent() > 0) {
      server_.EndUnreadOnLoop();
    }
  }
  TypeSet LegalOnLoop() const override { return kRequests; }
  Status OnFrameOnLoop(const Frame &frame) override;
  void OnEndedOnLoop(CloseCause, const Status &why) override {
    if (LogEnabled(LogLevel::kInfo) && server_.log_budget_.Take()) {
      Log(LogLevel::kInfo, "channel of " + caller_.name + " ended: " + why.text());
    }
    server_.RemoveOnLoop(id_);  // destroys this
  }

 private:
  template <typename Request, typename Answer>
  Status AnswerOnLoop(const Frame &frame, MessageType type, const Answer &answer);
  Status ReportOnLoop(const Frame &frame);
  void IsOf(uint64_t cluster_id) {
    if (cluster_id != asker_) {
      server_.askers_.Left(std::exchange(asker_, cluster_id), EventLoop::Clock::now());
      server_.askers_.Came(asker_);
    }
  }

  State &server_;
  const uint64_t id_;
  const Caller caller_;
  const std::shared_ptr<FrameConnection> connection_;
  TimePoint last_request_ = EventLoop::Clock::now();
  uint64_t asker_ = 0;  // what it said last: a guest is counted for one cluster, whatever it says
};

template <typename Request, typename Answer>
Status ChannelServer::State::Guest::AnswerOnLoop(const Frame &frame, MessageType type, const Answer &answer) {
  const Result<Request> request = Decode<Request>(frame.body);
  if (!request.ok()) {
    return request.status();
  }
  SendOnLoop(type, frame.seq, answer(request.value()));  // may destroy this
  return Status::Ok();
}

Status ChannelServer::State::Guest::OnFrameOnLoop(const Frame &frame) {
  last_request_ = EventLoop::Clock::now();
  switch (frame.type) {
    case MessageType::kRenew:
      return AnswerOnLoop<Renew>(frame, MessageType::kRenewed, [&](const Renew &renew) {
        return Encode(Renewed{server_.RenewOnLoop(renew, caller_.name)});
      });
    case MessageType::kConfirm:
      return AnswerOnLoop<Confirm>(frame, MessageType::kConfirmed, [&](const Confirm &confirm) {
        return Encode(Confirmed{
            server_.leases_->Confirm(confirm.token, confirm.generation, confirm.content, caller_.name)});
      });
    case MessageType::kRelease:
      return AnswerOnLoop<Release>(frame, MessageType::kReleased, [&](const Release &release) {
        server_.ReleaseOnLoop(release);
        return std::vector<uint8_t>();
      });
    case MessageType::kAwait:
      return server_.AwaitOnLoop(id_, frame);
    case MessageType::kReport:
      return ReportOnLoop(frame);
    default:
      return AnswerOnLoop<DescribeRank>(frame, MessageType::kRank, [&](const DescribeRank &asked) {
        RankAnswer answer = server_.DescribeOnLoop(asked);
        if (answer.status.ok()) {
          IsOf(asked.asker);
        }
        return Encode(answer);
      });
  }
}

// Who has no key of this very instance would tell others' Ds that tokens are final that are not.
Status ChannelServer::State::Guest::ReportOnLoop(const Frame &frame) {
  const Result<ReportProgress> report = Decode<ReportProgress>(frame.body);
  if (!report.ok()) {
    return report.status();
  }
  if (!SameBytes(report.value().key, server_.handoffs_->key())) {
    return Status(LLM_FAILED, "REPORT by no worker of this instance");
  }
  server_.handoffs_->Report(report.value().rank, report.value().marks);
  SendOnLoop(MessageType::kReported, frame.seq, {});  // may destroy this
  return Status::Ok();
}

// A lease is granted before its hand-off is sealed: what is a lease by now was one before, too.
std::vector<LeaseToken> ChannelServer::State::RenewOnLoop(const Renew &renew, const std::string &by) {
  const std::vector<LeaseToken> handoffs = handoffs_->Renewable(renew.tokens);
  return leases_->Renew(Without(renew.tokens, handoffs), renew.pulling, by);
}

void ChannelServer::State::ReleaseOnLoop(const Release &release) {
  leases_->Release(Without(release.tokens, handoffs_->Withdraw(release.tokens)));
}

Status ChannelServer::State::AwaitOnLoop(uint64_t guest, const Frame &frame) {
  const Result<Await> await = Decode<Await>(frame.body);
  if (!await.ok()) {
    return await.status();
  }
  if (awaits_.CountOf(guest) >= limits_.awaits_per_guest) {
    return Status(LLM_FAILED, "it waits for more than " + std::to_string(limits_.awaits_per_guest) + " hand-offs");
  }
  if (awaits_.size() >= limits_.awaits) {
    const uint64_t most = awaits_.GuestWithMost();
    if (most == guest) {
      return Status(LLM_FAILED, "it waits for more hand-offs than any other");
    }
    guests_.erase(most);
  }
  awaits_.TakeOnLoop(guest, frame.seq, await.value());
  return Status::Ok();
}

void ChannelServer::State::AnswerAwaitOnLoop(uint64_t guest, uint32_t seq, const HandoffNews &news) {
  guests_.at(guest)->SendOnLoop(MessageType::kHandoff, seq, Encode(news));
}

// Any number of tokens wakes the loop once.
void ChannelServer::State::OnHandoffNews(const LeaseToken &token) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    news_.push_back(token);
    if (news_.size() > 1) {
      return;
    }
  }
  const bool posted = loop_->Post([this] {
    std::unique_lock<std::mutex> lock(mutex_);
    const std::vector<LeaseToken> news = std::exchange(news_, {});
    lock.unlock();
    for (const LeaseToken &each : news) {
      awaits_.OnNewsOnLoop(each);
    }
  });
  if (!posted) {
    const std::lock_guard<std::mutex> lock(mutex_);
    news_.clear();
  }
}

Status ChannelServer::State::Start(Listeners listeners) {
  if (Status status = loop_->Start(); !status.ok()) {
    return status;
  }
  handoffs_->SetListener(weak_from_this());
  // The door holds us, and we hold the door, until Close.
  loop_->Run([&] {
    door_ = std::make_shared<FrontDoor>(loop_, trust_, [self = shared_from_this()](const Caller &) {
      return std::make_unique<Greeter>(self);
    });
    door_->StartOnLoop(std::move(listeners));
  });
  return Status::Ok();
}

void ChannelServer::State::Close() {
  const std::lock_guard<std::mutex> one_closer(close_mutex_);
  loop_->Run([this] {
    guests_.clear();
    if (const std::shared_ptr<FrontDoor> door = std::exchange(door_, nullptr)) {
      door->StopOnLoop();
    }
  });
  loop_->Stop();
}

Status ChannelServer::State::CheckGreeting(const std::vector<uint8_t> &body) const {
  const Result<VersionRange> versions = DecodeVersionRange(body);
  if (!versions.ok()) {
    return versions.status();
  }
  if (Status status = CheckVersions(versions.value()); !status.ok()) {
    return status;
  }
  const Result<ChannelGreeting> greeting = Decode<ChannelGreeting>(body);
  if (!greeting.ok()) {
    return greeting.status();
  }
  const uint16_t theirs = greeting.value().content_version;
  return theirs == grantor_.content_version
             ? Status::Ok()
             : Status(LLM_LINK_FAILED, "connector protocol versions differ: client " + std::to_string(theirs) +
                                           ", server " + std::to_string(grantor_.content_version));
}

void ChannelServer::State::WelcomeOnLoop(Visit &visit) {
  if (guests_.size() >= limits_.guests) {
    MakeRoomOnLoop();
  }
  if (guests_.empty()) {
    SweepOnLoop();
  }
  const uint64_t id = ++last_id_;
  guests_.emplace(id, std::make_unique<Guest>(*this, id, visit.caller(), visit.Take()));
}

// As at the door: of whoever has the most connections, so that nobody keeps all others out.
void ChannelServer::State::MakeRoomOnLoop() {
  std::map<std::string, size_t> counts;
  for (const auto &[id, guest] : guests_) {
    ++counts[guest->source()];
  }
  const auto most = std::max_element(counts.begin(), counts.end(),
                                     [](const auto &a, const auto &b) { return a.second < b.second; });
  auto silent = guests_.end();
  for (auto guest = guests_.begin(); guest != guests_.end(); ++guest) {
    const bool longer = silent == guests_.end() || guest->second->last_request() < silent->second->last_request();
    if (guest->second->source() == most->first && longer) {
      silent = guest;
    }
  }
  guests_.erase(silent);
}

// Together guests leave little unread; when it is too much, whoever has left it for longest is cut off.
void ChannelServer::State::EndUnreadOnLoop() {
  size_t unsent = 0;
  auto longest = guests_.end();
  for (auto guest = guests_.begin(); guest != guests_.end(); ++guest) {
    unsent += guest->second->unsent();
    const bool longer = guest->second->unsent() > 0 && (longest == guests_.end() || guest->second->stuck_since() <
                                                                                       longest->second->stuck_since());
    longest = longer ? guest : longest;
  }
  if (unsent > limits_.unsent) {
    guests_.erase(longest);
  }
}

// One timer for all guests: when it comes is of no importance to any of them.
void ChannelServer::State::SweepOnLoop() {
  const TimePoint now = EventLoop::Clock::now();
  for (auto guest = guests_.begin(); guest != guests_.end();) {
    const auto stuck = guest->second->stuck_since();
    const bool leaves = (stuck.has_value() && now - *stuck >= limits_.stuck) ||
                        now - guest->second->last_request() >= limits_.idle;
    guest = leaves ? guests_.erase(guest) : std::next(guest);
  }
  loop_->StopTimerOnLoop(sweep_timer_);
  const auto pause = std::min(limits_.stuck, limits_.idle) / 8;
  sweep_timer_ = loop_->StartTimerOnLoop(now + pause, [this] {
    if (!guests_.empty()) {
      SweepOnLoop();
    }
  });
}

RankAnswer ChannelServer::State::DescribeOnLoop(const DescribeRank &asked) {
  if (asked.engine_id != grantor_.engine_id || asked.incarnation != grantor_.incarnation) {
    return {Status(LLM_NOT_YET_LINK, "another instance lives at this address now"), {}};
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto geometry = geometries_.find(asked.rank);
  return geometry == geometries_.end() ? RankAnswer{Status(LLM_PARAM_INVALID, NoSuchRank(asked.rank, geometries_)), {}}
                                       : RankAnswer{Status::Ok(), geometry->second};
}

Result<std::unique_ptr<ChannelServer>> ChannelServer::Create(const SocketAddress &address, Grantor grantor,
                                                             const Trust &trust, std::shared_ptr<LeaseTable> leases,
                                                             const ChannelLimits &limits,
                                                             std::shared_ptr<HandoffTable> handoffs) {
  if (handoffs == nullptr) {
    Result<std::unique_ptr<HandoffTable>> none = HandoffTable::Create();
    if (!none.ok()) {
      return none.status();
    }
    handoffs = std::move(none).value();
  }
  Result<Listeners> listeners = ListenOpen(address, trust);
  if (!listeners.ok()) {
    return listeners.status();
  }
  const uint16_t port = SocketAddress::LocalOf(listeners.value().tcp.get()).port();
  const auto state = std::make_shared<State>(std::move(grantor), trust, std::move(leases),
                                             std::move(handoffs), limits);
  if (Status status = state->Start(std::move(listeners).value()); !status.ok()) {
    return status;
  }
  return std::unique_ptr<ChannelServer>(new ChannelServer(state, port));
}

ChannelServer::~ChannelServer() {
  if (in_forked_child()) {
    // The thread to join exists in the parent only; memory is all there is to lose.
    [[maybe_unused]] auto *const left = new std::shared_ptr<State>(std::move(state_));
    return;
  }
  state_->Close();
}

Status ChannelServer::SetGeometries(Geometries geometries) {
  for (const auto &[rank, geometry] : geometries) {
    if (geometry.size() > kMaxGeometry) {
      return Invalid("geometry of worker " + RankText(rank) + " has " + std::to_string(geometry.size()) +
                     " bytes; allowed: " + std::to_string(kMaxGeometry));
    }
  }
  state_->SetGeometries(std::move(geometries));
  return Status::Ok();
}

std::vector<uint64_t> ChannelServer::TakeLeftAskers() { return state_->TakeLeftAskers(); }
void ChannelServer::Close() { state_->Close(); }
bool ChannelServer::in_forked_child() const { return state_->in_forked_child(); }

}  // namespace datadist
