#include "channel/server.h"

#include <unistd.h>

#include <algorithm>
#include <optional>
#include <set>
#include <utility>

#include "base/hmac.h"
#include "channel/askers.h"
#include "channel/parked_awaits.h"
#include "channel/rank_geometries.h"
#include "channel/rank_orders.h"
#include "channel/role_desk.h"
#include "control/opening.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_LINK_FAILED;
using llm_datadist::LLM_NOT_YET_LINK;

constexpr TypeSet kRequests(MessageType::kDescribeRank, MessageType::kRenew, MessageType::kConfirm,
                            MessageType::kRelease, MessageType::kAwait, MessageType::kReport, MessageType::kOffer,
                            MessageType::kWatch, MessageType::kDeliver, MessageType::kSwitch, MessageType::kDeclare);
std::vector<LeaseToken> Without(std::vector<LeaseToken> tokens, const std::vector<LeaseToken> &taken) {
  const std::set<LeaseToken> gone(taken.begin(), taken.end());
  tokens.erase(std::remove_if(tokens.begin(), tokens.end(), [&](const auto &token) { return gone.count(token) > 0; }),
               tokens.end());
  return tokens;
}

}  // namespace

class ChannelServer::State : public HandoffListener, public Guests::Host, public std::enable_shared_from_this<State> {
 public:
  State(Grantor grantor, Trust trust, std::shared_ptr<LeaseTable> leases, std::shared_ptr<HandoffTable> handoffs,
        std::shared_ptr<RoleSwitch> roles, const ChannelLimits &limits)
      : grantor_(std::move(grantor)),
        trust_(std::move(trust)),
        leases_(std::move(leases)),
        handoffs_(std::move(handoffs)),
        limits_(limits),
        askers_(limits.grace),
        desk_(*loop_, std::move(roles), orders_, [this](uint64_t guest, uint32_t seq, const SwitchStatus &status) {
          guests_.SendOnLoop(guest, MessageType::kSwitched, seq, Encode(status));
        }) {}

  Status Start(Listeners listeners);
  void Close();
  RankGeometries &geometries() { return geometries_; }
  bool in_forked_child() const { return ::getpid() != pid_; }
  std::vector<uint64_t> TakeLeftAskers() { return askers_.TakeLeft(EventLoop::Clock::now()); }
  void OnHandoffNews(const LeaseToken &token) override;
  Status OnRequestOnLoop(const Guests::Request &request) override;
  void OnLeftOnLoop(uint64_t guest) override;

 private:
  class Greeter;
  Status CheckGreeting(const std::vector<uint8_t> &body) const;
  template <typename Message, typename Answer>
  Status AnswerOnLoop(const Guests::Request &request, MessageType type, const Answer &answer);
  RankAnswer DescribeOnLoop(const DescribeRank &asked);
  void IsOfOnLoop(uint64_t guest, uint64_t cluster_id);
  std::vector<LeaseToken> RenewOnLoop(const Renew &renew, const std::string &by);
  void ReleaseOnLoop(const Release &release);
  Status AwaitOnLoop(const Guests::Request &request);
  Offered OfferOnLoop(const Offer &offer);
  template <typename Message, typename Take>
  Status FromWorkerOnLoop(const Guests::Request &request, const Take &take);
  Status OfWorkerOnLoop(const Guests::Request &request);
  Status SwitchOnLoop(const Guests::Request &request);

  const Grantor grantor_;
  const Trust trust_;
  const std::shared_ptr<LeaseTable> leases_;
  const std::shared_ptr<HandoffTable> handoffs_;
  const ChannelLimits limits_;
  const pid_t pid_ = ::getpid();
  const std::shared_ptr<EventLoop> loop_ = std::make_shared<EventLoop>();

  Askers askers_;
  RankGeometries geometries_;
  std::mutex close_mutex_;
  std::mutex mutex_;
  std::vector<LeaseToken> news_;  // guarded by mutex_; of hand-offs, and the loop has been told that there is any

  // Owned by the loop thread.
  std::shared_ptr<FrontDoor> door_;
  Guests guests_{*loop_, limits_, kRequests, *this};
  ParkedAwaits awaits_{*loop_, *handoffs_, [this](uint64_t guest, uint32_t seq, const HandoffNews &news) {
                         guests_.SendOnLoop(guest, MessageType::kHandoff, seq, Encode(news));
                       }};
  RankOrders orders_{*loop_, [this](uint64_t guest, uint32_t seq, const Watched &watched) {
                       guests_.SendOnLoop(guest, MessageType::kWatched, seq, Encode(watched));
                     }};
  RoleDesk desk_;
  // Of guests that asked for a geometry, what they said last: one is counted for one cluster, whatever it says.
  std::map<uint64_t, uint64_t> clusters_;
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
    server_->guests_.WelcomeOnLoop(visit.caller(), visit.Take());
    return Status::Ok();
  }

 private:
  const std::shared_ptr<State> server_;
};

template <typename Message, typename Answer>
Status ChannelServer::State::AnswerOnLoop(const Guests::Request &request, MessageType type, const Answer &answer) {
  const Result<Message> message = Decode<Message>(request.frame.body);
  if (!message.ok()) {
    return message.status();
  }
  guests_.SendOnLoop(request.guest, type, request.frame.seq, answer(message.value()));
  return Status::Ok();
}

Status ChannelServer::State::OnRequestOnLoop(const Guests::Request &request) {
  switch (request.frame.type) {
    case MessageType::kRenew:
      return AnswerOnLoop<Renew>(request, MessageType::kRenewed, [&](const Renew &renew) {
        return Encode(Renewed{RenewOnLoop(renew, request.caller.name)});
      });
    case MessageType::kConfirm:
      return AnswerOnLoop<Confirm>(request, MessageType::kConfirmed, [&](const Confirm &confirm) {
        return Encode(Confirmed{leases_->Confirm(confirm.token, confirm.generation, confirm.content, request.caller.name)});
      });
    case MessageType::kRelease:
      return AnswerOnLoop<Release>(request, MessageType::kReleased, [&](const Release &release) {
        ReleaseOnLoop(release);
        return std::vector<uint8_t>();
      });
    case MessageType::kAwait:
      return AwaitOnLoop(request);
    case MessageType::kOffer:
      return AnswerOnLoop<Offer>(request, MessageType::kOffered,
                                 [&](const Offer &offer) { return Encode(OfferOnLoop(offer)); });
    case MessageType::kReport:
    case MessageType::kWatch:
    case MessageType::kDeliver:
    case MessageType::kDeclare:
      return OfWorkerOnLoop(request);
    case MessageType::kSwitch:
      return SwitchOnLoop(request);
    default:
      return AnswerOnLoop<DescribeRank>(request, MessageType::kRank, [&](const DescribeRank &asked) {
        RankAnswer answer = DescribeOnLoop(asked);
        if (answer.status.ok()) {
          IsOfOnLoop(request.guest, asked.asker);
        }
        return Encode(answer);
      });
  }
}

void ChannelServer::State::OnLeftOnLoop(uint64_t guest) {
  awaits_.DropOnLoop(guest);
  orders_.DropOnLoop(guest);
  desk_.DropOnLoop(guest);
  IsOfOnLoop(guest, 0);
}

void ChannelServer::State::IsOfOnLoop(uint64_t guest, uint64_t cluster_id) {
  const auto known = clusters_.find(guest);
  const uint64_t before = known == clusters_.end() ? 0 : known->second;
  if (before == cluster_id) {
    return;
  }
  askers_.Left(before, EventLoop::Clock::now());
  askers_.Came(cluster_id);
  if (cluster_id == 0) {
    clusters_.erase(known);
  } else {
    clusters_[guest] = cluster_id;
  }
}

// A lease is granted before its hand-off is sealed: what is a lease by now was one before, too.
std::vector<LeaseToken> ChannelServer::State::RenewOnLoop(const Renew &renew, const std::string &by) {
  const std::vector<LeaseToken> handoffs = handoffs_->Renewable(renew.tokens);
  return leases_->Renew(Without(renew.tokens, handoffs), renew.pulling, by);
}

void ChannelServer::State::ReleaseOnLoop(const Release &release) {
  leases_->Release(Without(release.tokens, handoffs_->Withdraw(release.tokens)));
}

Status ChannelServer::State::AwaitOnLoop(const Guests::Request &request) {
  const Result<Await> await = Decode<Await>(request.frame.body);
  if (!await.ok()) {
    return await.status();
  }
  if (awaits_.CountOf(request.guest) >= limits_.awaits_per_guest) {
    return Status(LLM_FAILED, "it waits for more than " + std::to_string(limits_.awaits_per_guest) + " hand-offs");
  }
  if (awaits_.size() >= limits_.awaits) {
    const uint64_t most = awaits_.GuestWithMost();
    if (most == request.guest) {
      return Status(LLM_FAILED, "it waits for more hand-offs than any other");
    }
    guests_.EndOnLoop(most);
  }
  awaits_.TakeOnLoop(request.guest, request.frame.seq, await.value());
  return Status::Ok();
}

Offered ChannelServer::State::OfferOnLoop(const Offer &offer) {
  if (const Status known = geometries_.Check(offer.rank); !known.ok()) {
    return {known};
  }
  const Result<bool> is_new = handoffs_->Offer(offer.token, offer.rank, offer.offer_id);
  if (!is_new.ok()) {
    return {is_new.status()};
  }
  if (is_new.value() && !orders_.PutOnLoop(offer)) {
    handoffs_->Deliver(offer.token, offer.rank, offer.offer_id, {DeliveryState::kFailed, 0, 0, 0, 0, "too many offers"});
  }
  return {};
}

Status ChannelServer::State::SwitchOnLoop(const Guests::Request &request) {
  const Result<Switch> wish = Decode<Switch>(request.frame.body);
  if (!wish.ok()) {
    return wish.status();
  }
  desk_.AskOnLoop(request.guest, request.frame.seq, request.caller, wish.value());
  return Status::Ok();
}

// Who has no key of this very instance would tell Ds that tokens are final that are not, or take others' offers.
template <typename Message, typename Take>
Status ChannelServer::State::FromWorkerOnLoop(const Guests::Request &request, const Take &take) {
  const Result<Message> message = Decode<Message>(request.frame.body);
  if (!message.ok()) {
    return message.status();
  }
  if (!SameBytes(message.value().key, handoffs_->key())) {
    return Status(LLM_FAILED, std::string(MessageName(request.frame.type)) + " by no worker of this instance");
  }
  take(message.value());
  return Status::Ok();
}

Status ChannelServer::State::OfWorkerOnLoop(const Guests::Request &request) {
  const auto reported = [&] { guests_.SendOnLoop(request.guest, MessageType::kReported, request.frame.seq, {}); };
  switch (request.frame.type) {
    case MessageType::kWatch:
      return FromWorkerOnLoop<Watch>(
          request, [&](const Watch &watch) { orders_.WatchOnLoop(request.guest, request.frame.seq, watch); });
    case MessageType::kDeliver:
      return FromWorkerOnLoop<Deliver>(request, [&](const Deliver &deliver) {
        handoffs_->Deliver(deliver.token, deliver.rank, deliver.offer_id, deliver.delivery);
        reported();
      });
    case MessageType::kDeclare:
      return FromWorkerOnLoop<Declare>(request, [&](const Declare &said) {
        desk_.DeclareOnLoop(said);
        reported();
      });
    default:
      return FromWorkerOnLoop<ReportProgress>(request, [&](const ReportProgress &report) {
        handoffs_->Report(report.rank, report.marks);
        reported();
      });
  }
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
    guests_.ClearOnLoop();
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

RankAnswer ChannelServer::State::DescribeOnLoop(const DescribeRank &asked) {
  if (asked.engine_id != grantor_.engine_id || asked.incarnation != grantor_.incarnation) {
    return {Status(LLM_NOT_YET_LINK, "another instance lives at this address now"), {}};
  }
  Result<std::vector<uint8_t>> geometry = geometries_.Find(asked.rank);
  return geometry.ok() ? RankAnswer{Status::Ok(), std::move(geometry).value()} : RankAnswer{geometry.status(), {}};
}

Result<std::unique_ptr<ChannelServer>> ChannelServer::Create(const SocketAddress &address, Grantor grantor,
                                                             const Trust &trust, std::shared_ptr<LeaseTable> leases,
                                                             const ChannelLimits &limits,
                                                             std::shared_ptr<HandoffTable> handoffs,
                                                             std::shared_ptr<RoleSwitch> roles) {
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
                                             std::move(handoffs), std::move(roles), limits);
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
  return state_->geometries().Set(std::move(geometries));
}

std::vector<uint64_t> ChannelServer::TakeLeftAskers() { return state_->TakeLeftAskers(); }
void ChannelServer::Close() { state_->Close(); }
bool ChannelServer::in_forked_child() const { return state_->in_forked_child(); }

}  // namespace datadist
