// The owner's side of a link: what the peer may ask of us. Runs on the loop and never blocks.
#include <algorithm>
#include <exception>
#include <utility>

#include "link/link.h"
#include "memory/digests.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;

// For an unlinked peer to read the answer and close, before we do.
constexpr std::chrono::seconds kLingerAfterUnlink{1};

}  // namespace

bool Link::HasToken(const LinkToken &token) const { return SameBytes(token_, token); }

Status Link::OnRequestOnLoop(const Frame &frame) {
  switch (frame.type) {
    case MessageType::kDescribe:
      return OnDescribeOnLoop(frame);
    case MessageType::kPush:
      return OnPushOnLoop(frame);
    case MessageType::kDigest:
      return OnDigestOnLoop(frame);
    case MessageType::kConsume:
      return OnConsumeOnLoop(frame);
    case MessageType::kUnlink:
      return OnUnlinkOnLoop(frame);
    default:
      break;
  }
  return Status(LLM_FAILED, std::string(MessageName(frame.type)) + " is not a request");
}

void Link::OnClosedOnLoop(CloseCause cause, const std::string &reason) { Lose(cause, reason); }

Status Link::OnDescribeOnLoop(const Frame &frame) {
  const Result<DescribeRequest> request = Decode<DescribeRequest>(frame.body);
  if (!request.ok()) {
    return request.status();
  }
  CacheInfo info;
  const Result<NamedCache> named = FindForPeer(request.value().ref);
  if (named.ok()) {
    RemoteTarget &target = info.target;
    const RegisteredCache &cache = named.value().pin.cache();
    const bool readable = endpoint_->regions()->PeersMayRead(cache);
    target.cache = incoming_.transport->Describe(cache, readable ? Disclosure::kForReading : Disclosure::kForWriting);
    target.has_row = named.value().row.has_value();
    target.row = named.value().row.value_or(0);
    target.tensor = named.value().tensor;
    target.offset = named.value().offset;
    target.lasting = named.value().lasting;
  } else {
    info.status = named.status();
  }
  session_->Send(MessageType::kCacheInfo, frame.seq, Encode(info));
  return Status::Ok();
}

Result<NamedCache> Link::FindForPeer(const CacheRef &ref) const {
  // Before it is looked for: where nobody may read or write, nobody is told what there is.
  if (Status status = endpoint_->regions()->CheckPeerUse(PeerUse::kDescribe); !status.ok()) {
    return status;
  }
  Result<NamedCache> named = endpoint_->caches()->Find(ref);
  if (named.ok()) {
    const PeerRequest asks{peer_.cluster_id, PeerUse::kDescribe};
    if (Status status = endpoint_->regions()->CheckPeerRequest(named.value().pin.cache(), asks); !status.ok()) {
      return status;
    }
  }
  return named;
}

// Runs `work` on a thread of the endpoint's, then `answer`. One at a time: the peer waits for its answer before it asks
// for more, and who closes the link waits for the work.
Status Link::ServeOnLoop(std::function<void()> work, std::function<void()> answer) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (serving_) {
      return Status(LLM_FAILED, "a request before the one before it was answered");
    }
    serving_ = true;
  }
  // Ends with the task, however that ends.
  std::shared_ptr<void> running(nullptr, [self = shared_from_this()](void *) {
    const std::lock_guard<std::mutex> lock(self->mutex_);
    self->serving_ = false;
    self->served_.notify_all();
  });
  const bool taken = endpoint_->serving().Post(
      [running = std::move(running), work = std::move(work), answer = std::move(answer)]() mutable {
        work();
        running.reset();  // the peer may send the next as soon as it reads the answer
        answer();
      });
  return taken ? Status::Ok() : Status(LLM_FAILED, "no thread to serve a request with");
}

Status Link::OnPushOnLoop(const Frame &frame) {
  Result<PushRequest> request = Decode<PushRequest>(frame.body);
  if (!request.ok()) {
    return request.status();
  }
  if (owner_path_->reading() == nullptr) {
    return Status(LLM_FAILED, "PUSH on a link whose peer comes by " + incoming_.name);
  }
  const auto pushed = std::make_shared<Pushed>();
  const std::shared_ptr<Link> self = shared_from_this();
  return ServeOnLoop([self, pushed, request = std::move(request).value()] { pushed->status = self->ServePush(request); },
                     [self, pushed, seq = frame.seq] {
                       self->session_->Send(MessageType::kPushed, seq, Encode(*pushed));
                     });
}

Status Link::OnDigestOnLoop(const Frame &frame) {
  Result<DigestRequest> request = Decode<DigestRequest>(frame.body);
  if (!request.ok()) {
    return request.status();
  }
  const auto digests = std::make_shared<Digests>();
  const std::shared_ptr<Link> self = shared_from_this();
  return ServeOnLoop([self, digests, request = std::move(request).value()] { *digests = self->ServeDigest(request); },
                     [self, digests, seq = frame.seq] {
                       self->session_->Send(MessageType::kDigests, seq, Encode(*digests));
                     });
}

Digests Link::ServeDigest(const DigestRequest &request) try {
  const PeerRequest asks{peer_.cluster_id, PeerUse::kDigest, {request.first_tensor, request.tensor_count},
                         request.ranges};
  const Result<CachePin> pin = endpoint_->regions()->PinForPeer(request.cache_id, request.generation, asks);
  if (!pin.ok()) {
    return Digests{pin.status(), {}};
  }
  const auto hold = std::min(std::chrono::milliseconds(request.remaining_ms), endpoint_->MaxPeerHold());
  Result<std::vector<uint32_t>> digests = DigestsOf(
      pin.value(), {request.first_tensor, request.tensor_count}, request.ranges, Deadline::In(hold));
  return digests.ok() ? Digests{Status::Ok(), std::move(digests).value()} : Digests{digests.status(), {}};
} catch (const std::exception &error) {
  return Digests{Status(LLM_FAILED, std::string("digest: ") + error.what()), {}};
}

// On a thread of the endpoint's. No memory for it is a failed push, not a broken process.
Status Link::ServePush(const PushRequest &request) try {
  const PeerRequest writes{peer_.cluster_id, PeerUse::kWrite, {request.first_tensor, request.tensor_count},
                           {request.runs, &Run::local_offset}};
  const Result<CachePin> pin = endpoint_->regions()->PinForPeer(request.cache_id, request.generation, writes);
  if (!pin.ok()) {
    return pin.status();
  }
  TransferOp op;
  op.remote = &request.source;
  op.local = &pin.value();
  op.remote_first_tensor = request.source_first_tensor;
  op.local_first_tensor = request.first_tensor;
  op.tensor_count = request.tensor_count;
  op.runs = request.runs;
  const auto hold = std::min(std::chrono::milliseconds(request.remaining_ms), endpoint_->MaxPeerHold());
  return owner_path_->reading()->Pull(op, Deadline::In(hold));
} catch (const std::exception &error) {
  return Status(LLM_FAILED, std::string("push: ") + error.what());
}

Status Link::OnConsumeOnLoop(const Frame &frame) {
  const Result<ConsumeRequest> request = Decode<ConsumeRequest>(frame.body);
  if (!request.ok()) {
    return request.status();
  }
  const ConsumeRequest &pulled = request.value();
  const Consumed answer{
      endpoint_->caches()->Consume(pulled.key, pulled.generation, pulled.first_tensor, pulled.tensor_count)};
  session_->Send(MessageType::kConsumed, frame.seq, Encode(answer));
  return Status::Ok();
}

Status Link::OnUnlinkOnLoop(const Frame &frame) {
  const Result<UnlinkRequest> request = Decode<UnlinkRequest>(frame.body);
  if (!request.ok()) {
    return request.status();
  }
  if (request.value().cluster_id != peer_.cluster_id || !HasToken(request.value().token)) {
    return Status(LLM_FAILED, "UNLINK of another link");
  }
  OnUnlinkedByPeerOnLoop([session = session_, loop = endpoint_->loop(), seq = frame.seq] {
    session->Send(MessageType::kUnlinked, seq, {});
    loop->Post([session, loop = loop.get()] {
      loop->StartTimerOnLoop(EventLoop::Clock::now() + kLingerAfterUnlink,
                             [session] { session->Close(CloseCause::kByUs, "unlinked by the peer"); });
    });
  });
  return Status::Ok();
}

}  // namespace datadist
