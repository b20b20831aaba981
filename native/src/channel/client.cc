#include "channel/client.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <map>
#include <mutex>
#include <utility>

#include "base/fd.h"
#include "base/socket_io.h"
#include "channel/remote_server.h"
#include "control/event_loop.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;

struct ToOutgoing {
  uint64_t id;
  OutgoingRequest operator()(const DescribeRank &request) const {
    return {id, MessageType::kDescribeRank, MessageType::kRank, Encode(request)};
  }
  OutgoingRequest operator()(const Renew &request) const {
    return {id, MessageType::kRenew, MessageType::kRenewed, Encode(request)};
  }
  OutgoingRequest operator()(const Confirm &request) const {
    return {id, MessageType::kConfirm, MessageType::kConfirmed, Encode(request)};
  }
  OutgoingRequest operator()(const Release &request) const {
    return {id, MessageType::kRelease, MessageType::kReleased, Encode(request)};
  }
  OutgoingRequest operator()(const Await &request) const {
    return {id, MessageType::kAwait, MessageType::kHandoff, Encode(request)};
  }
  OutgoingRequest operator()(const ReportProgress &request) const {
    return {id, MessageType::kReport, MessageType::kReported, Encode(request)};
  }
  OutgoingRequest operator()(const Offer &request) const {
    return {id, MessageType::kOffer, MessageType::kOffered, Encode(request)};
  }
  OutgoingRequest operator()(const Watch &request) const {
    return {id, MessageType::kWatch, MessageType::kWatched, Encode(request)};
  }
  OutgoingRequest operator()(const Deliver &request) const {
    return {id, MessageType::kDeliver, MessageType::kReported, Encode(request)};
  }
  OutgoingRequest operator()(const Declare &request) const {
    return {id, MessageType::kDeclare, MessageType::kReported, Encode(request)};
  }
  OutgoingRequest operator()(const Switch &request) const {
    return {id, MessageType::kSwitch, MessageType::kSwitched, Encode(request)};
  }
};

std::chrono::milliseconds PatienceOf(const ChannelRequest &request) {
  if (const auto *const await = std::get_if<Await>(&request); await != nullptr) {
    return std::chrono::milliseconds(await->patience_ms);
  }
  if (const auto *const wish = std::get_if<Switch>(&request); wish != nullptr) {
    return std::chrono::milliseconds(wish->patience_ms);
  }
  const auto *const watch = std::get_if<Watch>(&request);
  return std::chrono::milliseconds(watch != nullptr ? watch->patience_ms : 0);
}

}  // namespace

class ChannelClient::State : public RemoteServer::Owner {
 public:
  State(uint16_t content_version, Trust trust, const ChannelClientLimits &limits, Fd event)
      : content_version_(content_version), trust_(std::move(trust)), limits_(limits), event_(std::move(event)) {}

  Status Start() { return loop_.Start(); }
  uint64_t Send(const std::string &ip, uint16_t port, const ChannelRequest &request, std::chrono::milliseconds timeout);
  std::vector<ChannelAnswer> Take();
  void Close();
  int event_fd() const { return event_.get(); }
  bool in_forked_child() const { return ::getpid() != pid_; }

  void OnAnswerOnLoop(ChannelAnswer answer) override;
  void OnUnusedOnLoop(const std::string &name) override { servers_.erase(name); }

 private:
  // What is known of a request until it comes back.
  struct Outstanding {
    std::string server;
    uint64_t timer;
  };
  void SendOnLoop(const SocketAddress &address, OutgoingRequest request, EventLoop::Clock::time_point deadline);
  void Complete(ChannelAnswer answer);

  const uint16_t content_version_;
  const Trust trust_;
  const ChannelClientLimits limits_;
  const Fd event_;
  const pid_t pid_ = ::getpid();
  std::atomic<uint64_t> last_id_{0};
  EventLoop loop_;

  std::mutex close_mutex_;
  std::mutex mutex_;
  std::vector<ChannelAnswer> answers_;  // guarded by mutex_

  // Owned by the loop thread.
  std::map<std::string, std::unique_ptr<RemoteServer>> servers_;
  std::map<uint64_t, Outstanding> outstanding_;
};

uint64_t ChannelClient::State::Send(const std::string &ip, uint16_t port, const ChannelRequest &request,
                                    std::chrono::milliseconds timeout) {
  const uint64_t id = ++last_id_;
  const Result<SocketAddress> address = SocketAddress::FromIp(ip, port);
  if (!address.ok()) {
    Complete({id, NoAnswer{address.status().text(), false}});
    return id;
  }
  // So far ahead that the request means "no deadline", so near that the clock can reach it.
  constexpr std::chrono::milliseconds kLongestWait = std::chrono::hours(24 * 365);
  const auto deadline = EventLoop::Clock::now() + PatienceOf(request) + std::min(timeout, kLongestWait);
  const bool posted = loop_.Post([this, address = address.value(), deadline,
                                  outgoing = std::visit(ToOutgoing{id}, request)]() mutable {
    SendOnLoop(address, std::move(outgoing), deadline);
  });
  if (!posted) {
    Complete({id, NoAnswer{"the channel client is closed", false}});
  }
  return id;
}

void ChannelClient::State::SendOnLoop(const SocketAddress &address, OutgoingRequest request,
                                      EventLoop::Clock::time_point deadline) {
  const std::string name = address.ToString();
  std::unique_ptr<RemoteServer> *server = nullptr;
  if (const auto known = servers_.find(name); known != servers_.end()) {
    server = &known->second;
  } else if (servers_.size() < limits_.servers) {
    const RemoteServer::Setup setup{loop_, address, trust_, content_version_, limits_.idle};
    server = &servers_.emplace(name, std::make_unique<RemoteServer>(setup, *this)).first->second;
  } else {
    Complete({request.id,
              NoAnswer{name + ": more than " + std::to_string(limits_.servers) + " channels are open", false}});
    return;
  }
  const uint64_t id = request.id;
  const uint64_t timer = loop_.StartTimerOnLoop(deadline, [this, id] {
    const auto it = outstanding_.find(id);
    servers_.at(it->second.server)->ExpireOnLoop(id);
  });
  outstanding_.emplace(id, Outstanding{name, timer});
  (*server)->SendOnLoop(std::move(request));
}

void ChannelClient::State::OnAnswerOnLoop(ChannelAnswer answer) {
  const auto it = outstanding_.find(answer.id);
  loop_.StopTimerOnLoop(it->second.timer);
  outstanding_.erase(it);
  Complete(std::move(answer));
}

void ChannelClient::State::Complete(ChannelAnswer answer) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (answers_.empty()) {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = ::write(event_.get(), &one, sizeof(one));
  }
  answers_.push_back(std::move(answer));
}

std::vector<ChannelAnswer> ChannelClient::State::Take() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!answers_.empty()) {
    uint64_t count = 0;
    [[maybe_unused]] const ssize_t size = ::read(event_.get(), &count, sizeof(count));
  }
  return std::exchange(answers_, {});
}

void ChannelClient::State::Close() {
  const std::lock_guard<std::mutex> one_closer(close_mutex_);
  loop_.Run([this] {
    outstanding_.clear();
    servers_.clear();
  });
  loop_.Stop();
}

Result<std::unique_ptr<ChannelClient>> ChannelClient::Create(uint16_t content_version, const Trust &trust,
                                                             const ChannelClientLimits &limits) {
  Fd event(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!event) {
    return Status(LLM_FAILED, "eventfd: " + ErrnoText(errno));
  }
  auto state = std::make_shared<State>(content_version, trust, limits, std::move(event));
  if (Status status = state->Start(); !status.ok()) {
    return status;
  }
  return std::unique_ptr<ChannelClient>(new ChannelClient(std::move(state)));
}

ChannelClient::~ChannelClient() {
  if (in_forked_child()) {
    // The thread to join exists in the parent only; memory is all there is to lose.
    [[maybe_unused]] auto *const left = new std::shared_ptr<State>(std::move(state_));
    return;
  }
  state_->Close();
}

uint64_t ChannelClient::Send(const std::string &ip, uint16_t port, const ChannelRequest &request,
                             std::chrono::milliseconds timeout) {
  return state_->Send(ip, port, request, timeout);
}
std::vector<ChannelAnswer> ChannelClient::Take() { return state_->Take(); }
int ChannelClient::event_fd() const { return state_->event_fd(); }
void ChannelClient::Close() { state_->Close(); }
bool ChannelClient::in_forked_child() const { return state_->in_forked_child(); }

}  // namespace datadist
