#include "channel/remote_server.h"

#include <algorithm>
#include <utility>

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_TIMEOUT;

// Short enough for a passing fault, and no load for a server that ends whatever comes.
constexpr std::chrono::milliseconds kFirstPause{50};
constexpr std::chrono::milliseconds kLongestPause{1000};

// Until a server is dialled again that has ended so many connections in a row.
std::chrono::milliseconds PauseAfter(uint32_t cuts) {
  return cuts <= 1 ? std::chrono::milliseconds::zero()
                   : std::min(kLongestPause, kFirstPause * (1U << std::min(cuts - 2, 10U)));
}

template <typename Message>
Result<ChannelAnswer> Decoded(uint64_t id, const Frame &frame) {
  Result<Message> message = Decode<Message>(frame.body);
  return message.ok() ? Result<ChannelAnswer>(ChannelAnswer{id, std::move(message).value()}) : message.status();
}

Result<ChannelAnswer> DecodeAnswer(uint64_t id, const Frame &frame) {
  switch (frame.type) {
    case MessageType::kRank:
      return Decoded<RankAnswer>(id, frame);
    case MessageType::kRenewed:
      return Decoded<Renewed>(id, frame);
    case MessageType::kConfirmed:
      return Decoded<Confirmed>(id, frame);
    case MessageType::kHandoff:
      return Decoded<HandoffNews>(id, frame);
    case MessageType::kOffered:
      return Decoded<Offered>(id, frame);
    case MessageType::kWatched:
      return Decoded<Watched>(id, frame);
    case MessageType::kSwitched:
      return Decoded<SwitchStatus>(id, frame);
    default:
      break;
  }
  if (const Status empty = DecodeEmpty(frame.body); !empty.ok()) {
    return empty;
  }
  return frame.type == MessageType::kReported ? ChannelAnswer{id, Reported{}} : ChannelAnswer{id, Released{}};
}

}  // namespace

RemoteServer::RemoteServer(Setup setup, Owner &owner)
    : setup_(std::move(setup)), name_(setup_.address.ToString()), owner_(owner) {}

RemoteServer::~RemoteServer() {
  setup_.loop.StopTimerOnLoop(idle_timer_);
  setup_.loop.StopTimerOnLoop(dial_timer_);
  if (connection_ != nullptr) {
    connection_->CloseOnLoop();
  }
}

void RemoteServer::SendOnLoop(OutgoingRequest request) {
  setup_.loop.StopTimerOnLoop(idle_timer_);
  WriteOnLoop(Pending{std::move(request)});
}

void RemoteServer::WriteOnLoop(Pending pending) {
  if (connection_ == nullptr) {
    waiting_.push_back(std::move(pending));
    DialOnLoop();
    return;
  }
  const uint32_t seq = ++last_seq_;
  const OutgoingRequest &request = pending_.emplace(seq, std::move(pending)).first->second.request;
  connection_->SendOnLoop(request.type, seq, request.body);
}

void RemoteServer::DialOnLoop() {
  if (dial_ != nullptr || dial_timer_ != 0) {
    return;
  }
  dial_ = std::make_unique<ChannelDial>(setup_.loop, setup_.address, setup_.trust, setup_.content_version,
                                 [this](Result<std::shared_ptr<FrameConnection>> dialled) {
                                   OnDialledOnLoop(std::move(dialled));
                                 });
  dial_->StartOnLoop();
}

void RemoteServer::OnDialledOnLoop(Result<std::shared_ptr<FrameConnection>> dialled) {
  const std::unique_ptr<ChannelDial> ended = std::move(dial_);
  if (ended->was_cut()) {
    OnCutOnLoop(dialled.status());
    return;
  }
  if (!dialled.ok()) {
    FailOnLoop({name_ + " does not let us connect: " + dialled.status().text(),
                dialled.status().code() == LLM_TIMEOUT});
    return;
  }
  connection_ = std::move(dialled).value();
  connection_->SetHandlerOnLoop(this);
  for (Pending &pending : std::exchange(waiting_, {})) {
    WriteOnLoop(std::move(pending));
  }
}

// All that waits for it: while it is being dialled nothing has been sent.
void RemoteServer::FailOnLoop(const NoAnswer &why) {
  for (const Pending &pending : std::exchange(waiting_, {})) {
    owner_.OnAnswerOnLoop({pending.request.id, why});
  }
  owner_.OnUnusedOnLoop(name_);  // destroys this
}

void RemoteServer::OnCutOnLoop(const Status &why) {
  ++cuts_;
  last_cut_ = why.text();
  dial_timer_ = setup_.loop.StartTimerOnLoop(EventLoop::Clock::now() + PauseAfter(cuts_), [this] {
    dial_timer_ = 0;
    DialOnLoop();
  });
}

void RemoteServer::ExpireOnLoop(uint64_t id) {
  const std::string cuts =
      cuts_ == 0 ? "" : "; connections that it ended: " + std::to_string(cuts_) + " (" + last_cut_ + ")";
  owner_.OnAnswerOnLoop({id, NoAnswer{name_ + " did not answer in time" + cuts, true}});
  const auto is_it = [id](const Pending &pending) { return pending.request.id == id; };
  waiting_.erase(std::remove_if(waiting_.begin(), waiting_.end(), is_it), waiting_.end());
  for (auto &[seq, pending] : pending_) {
    pending.given_up = pending.given_up || is_it(pending);
  }
  if (!IsWaitedFor()) {
    owner_.OnUnusedOnLoop(name_);  // destroys this
  }
}

bool RemoteServer::IsWaitedFor() const {
  return !waiting_.empty() || std::any_of(pending_.begin(), pending_.end(),
                                          [](const auto &entry) { return !entry.second.given_up; });
}

void RemoteServer::RestOnLoop() {
  setup_.loop.StopTimerOnLoop(idle_timer_);
  idle_timer_ = setup_.loop.StartTimerOnLoop(EventLoop::Clock::now() + setup_.idle, [this] {
    owner_.OnUnusedOnLoop(name_);  // destroys this
  });
}

// Answers are legal while somebody asked: of those that nobody did, not even the bytes are taken in.
TypeSet RemoteServer::LegalOnLoop() const {
  TypeSet legal;
  for (const auto &[seq, pending] : pending_) {
    legal.Add(pending.request.answer);
  }
  return legal;
}

Status RemoteServer::OnFrameOnLoop(const Frame &frame) {
  const auto it = pending_.find(frame.seq);
  if (it == pending_.end() || it->second.request.answer != frame.type) {
    return Status(LLM_FAILED, std::string("unasked ") + MessageName(frame.type));
  }
  Result<ChannelAnswer> answer = DecodeAnswer(it->second.request.id, frame);
  if (!answer.ok()) {
    return answer.status();
  }
  const bool given_up = it->second.given_up;
  pending_.erase(it);
  cuts_ = 0;
  if (!given_up) {
    owner_.OnAnswerOnLoop(std::move(answer).value());
  }
  if (!IsWaitedFor()) {
    RestOnLoop();
  }
  return Status::Ok();
}

void RemoteServer::OnEndedOnLoop(CloseCause cause, const Status &why) {
  connection_ = nullptr;
  last_seq_ = 0;
  for (auto &[seq, pending] : std::exchange(pending_, {})) {
    if (pending.given_up) {
      continue;
    }
    if (cause == CloseCause::kProtocol) {
      owner_.OnAnswerOnLoop({pending.request.id, NoAnswer{name_ + ": " + why.text(), false}});
      continue;
    }
    waiting_.push_back(std::move(pending));
  }
  if (!IsWaitedFor()) {
    owner_.OnUnusedOnLoop(name_);  // destroys this
    return;
  }
  OnCutOnLoop(why);
}

}  // namespace datadist
