#include "channel/guests.h"

#include <sys/resource.h>

#include <algorithm>
#include <utility>

namespace datadist {
namespace {

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

class Guests::Guest : public FrameConnection::Handler {
 public:
  Guest(Guests &guests, uint64_t id, Caller caller, FrameSocket socket)
      : guests_(guests),
        id_(id),
        caller_(std::move(caller)),
        connection_(FrameConnection::OpenOnLoop(guests.loop_, std::move(socket),
                                                FrameConnection::Reads::kWhenAllIsSent, this)) {}
  ~Guest() override { connection_->CloseOnLoop(); }
  Guest(const Guest &) = delete;
  Guest &operator=(const Guest &) = delete;

  FrameConnection &connection() { return *connection_; }
  const std::string &source() const { return caller_.source; }
  size_t unsent() const { return connection_->unsent(); }
  std::optional<TimePoint> stuck_since() const { return connection_->stuck_since(); }
  TimePoint last_request() const { return last_request_; }

  TypeSet LegalOnLoop() const override { return guests_.requests_; }
  Status OnFrameOnLoop(const Frame &frame) override {
    last_request_ = EventLoop::Clock::now();
    return guests_.host_.OnRequestOnLoop({id_, caller_, frame});  // may destroy this
  }
  void OnEndedOnLoop(CloseCause, const Status &why) override {
    if (LogEnabled(LogLevel::kInfo) && guests_.log_budget_.Take()) {
      Log(LogLevel::kInfo, "channel of " + caller_.name + " ended: " + why.text());
    }
    guests_.EndOnLoop(id_);  // destroys this
  }

 private:
  Guests &guests_;
  const uint64_t id_;
  const Caller caller_;
  const std::shared_ptr<FrameConnection> connection_;
  TimePoint last_request_ = EventLoop::Clock::now();
};

Guests::Guests(EventLoop &loop, const ChannelLimits &limits, TypeSet requests, Host &host)
    : loop_(loop), limits_(WithinDescriptors(limits)), requests_(requests), host_(host) {}

Guests::~Guests() = default;

void Guests::WelcomeOnLoop(Caller caller, FrameSocket socket) {
  if (guests_.size() >= limits_.guests) {
    MakeRoomOnLoop();
  }
  if (guests_.empty()) {
    SweepOnLoop();
  }
  const uint64_t id = ++last_id_;
  guests_.emplace(id, std::make_unique<Guest>(*this, id, std::move(caller), std::move(socket)));
}

void Guests::SendOnLoop(uint64_t guest, MessageType type, uint32_t seq, const std::vector<uint8_t> &body) {
  Guest &to = *guests_.at(guest);
  to.connection().SendOnLoop(type, seq, body);
  if (to.unsent() > 0) {
    EndUnreadOnLoop();
  }
}

void Guests::EndOnLoop(uint64_t guest) { EndOnLoop(guests_.find(guest)); }

Guests::Map::iterator Guests::EndOnLoop(Map::iterator guest) {
  host_.OnLeftOnLoop(guest->first);
  return guests_.erase(guest);
}

void Guests::ClearOnLoop() {
  while (!guests_.empty()) {
    EndOnLoop(guests_.begin());
  }
}

// As at the door: of whoever has the most connections, so that nobody keeps all others out.
void Guests::MakeRoomOnLoop() {
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
  EndOnLoop(silent);
}

// Together guests leave little unread; when it is too much, whoever has left it for longest is cut off.
void Guests::EndUnreadOnLoop() {
  size_t unsent = 0;
  auto longest = guests_.end();
  for (auto guest = guests_.begin(); guest != guests_.end(); ++guest) {
    unsent += guest->second->unsent();
    const bool longer = guest->second->unsent() > 0 && (longest == guests_.end() || guest->second->stuck_since() <
                                                                                       longest->second->stuck_since());
    longest = longer ? guest : longest;
  }
  if (unsent > limits_.unsent) {
    EndOnLoop(longest);
  }
}

// One timer for all guests: when it comes is of no importance to any of them.
void Guests::SweepOnLoop() {
  const TimePoint now = EventLoop::Clock::now();
  for (auto guest = guests_.begin(); guest != guests_.end();) {
    const auto stuck = guest->second->stuck_since();
    const bool leaves = (stuck.has_value() && now - *stuck >= limits_.stuck) ||
                        now - guest->second->last_request() >= limits_.idle;
    guest = leaves ? EndOnLoop(guest) : std::next(guest);
  }
  loop_.StopTimerOnLoop(sweep_timer_);
  const auto pause = std::min(limits_.stuck, limits_.idle) / 8;
  sweep_timer_ = loop_.StartTimerOnLoop(now + pause, [this] {
    if (!guests_.empty()) {
      SweepOnLoop();
    }
  });
}

}  // namespace datadist
