// The owner's side of a link: what the peer may ask of us. Runs on the loop and never blocks.
#include <algorithm>
#include <utility>

#include "base/checked.h"
#include "link/link.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_KV_CACHE_NOT_EXIST;
using llm_datadist::LLM_PARAM_INVALID;

// A peer runs one transfer at a time, so more than one grant means that it gave up on the others. They expire.
constexpr size_t kMaxGrants = 16;
// For an unlinked peer to read the answer and close, before we do.
constexpr std::chrono::seconds kLingerAfterUnlink{1};

bool SameToken(const LinkToken &a, const LinkToken &b) {
  uint8_t difference = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference = static_cast<uint8_t>(difference | (a[i] ^ b[i]));
  }
  return difference == 0;
}

}  // namespace

bool Link::HasToken(const LinkToken &token) const { return SameToken(token_, token); }

Status Link::OnRequestOnLoop(const Frame &frame) {
  switch (frame.type) {
    case MessageType::kDescribe:
      return OnDescribeOnLoop(frame);
    case MessageType::kAcquireWrite:
      return OnAcquireWriteOnLoop(frame);
    case MessageType::kReleaseWrite:
      return OnReleaseWriteOnLoop(frame);
    case MessageType::kConsume:
      return OnConsumeOnLoop(frame);
    case MessageType::kUnlink:
      return OnUnlinkOnLoop(frame);
    case MessageType::kHello:
    case MessageType::kWelcome:
    case MessageType::kReject:
    case MessageType::kReady:
    case MessageType::kAttach:
    case MessageType::kAttached:
    case MessageType::kEstablished:
    case MessageType::kPing:
    case MessageType::kPong:
    case MessageType::kCacheInfo:
    case MessageType::kGrant:
    case MessageType::kUnlinked:
    case MessageType::kConsumed:
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
  const Result<NamedCache> named = endpoint_->caches()->Find(request.value().ref);
  if (named.ok()) {
    const RegisteredCache &cache = named.value().pin.cache();
    RemoteTarget &target = info.target;
    target.cache.cache_id = cache.id();
    target.cache.generation = cache.generation();
    target.cache.geometry = cache.geometry();
    // Addresses go only to a peer that can use them: on this host, by cma.
    if (incoming_ == TransportKind::kCma) {
      target.cache.stamp_addr = reinterpret_cast<uint64_t>(&cache.stamp()->generation);
      target.cache.tensor_addrs = cache.addrs();
    }
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

Status Link::OnAcquireWriteOnLoop(const Frame &frame) {
  const Result<AcquireWriteRequest> request = Decode<AcquireWriteRequest>(frame.body);
  if (!request.ok()) {
    return request.status();
  }
  if (incoming_ != TransportKind::kCma) {
    return Status(LLM_FAILED, "ACQUIRE_WRITE on a link whose peer does not write by itself");
  }
  const Result<uint64_t> granted = GrantWriteOnLoop(request.value());
  Grant answer;
  if (granted.ok()) {
    answer.grant = granted.value();
  } else {
    answer.status = granted.status();
  }
  session_->Send(MessageType::kGrant, frame.seq, Encode(answer));
  return Status::Ok();
}

Result<uint64_t> Link::GrantWriteOnLoop(const AcquireWriteRequest &request) {
  Result<CachePin> pin = endpoint_->regions()->Pin(request.cache_id);
  if (!pin.ok()) {
    return pin.status();
  }
  const RegisteredCache &cache = pin.value().cache();
  if (cache.generation() != request.generation) {
    return Status(LLM_KV_CACHE_NOT_EXIST, "cache " + std::to_string(request.cache_id) + " was registered anew");
  }
  const CacheGeometry &geometry = cache.geometry();
  if (!RangeFits(request.first_tensor, request.tensor_count, geometry.num_tensors) ||
      request.end > geometry.tensor_bytes) {
    return Status(LLM_PARAM_INVALID,
                  "write to tensors " + std::to_string(request.first_tensor) + "+" +
                      std::to_string(request.tensor_count) + " up to byte " + std::to_string(request.end) +
                      ": cache " + std::to_string(request.cache_id) + " has " + std::to_string(geometry.num_tensors) +
                      " tensors of " + std::to_string(geometry.tensor_bytes) + " bytes");
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  if (state_ != LinkState::kEstablished) {
    return Status(LLM_FAILED, "the link is down");
  }
  if (grants_.size() >= kMaxGrants) {
    return Status(LLM_FAILED, std::to_string(grants_.size()) + " writes are under way, at most " +
                                  std::to_string(kMaxGrants));
  }
  const uint64_t id = ++last_grant_;
  const auto hold = std::min(std::chrono::milliseconds(request.remaining_ms), endpoint_->MaxPeerHold());
  const uint64_t timer =
      endpoint_->loop()->StartTimerOnLoop(EventLoop::Clock::now() + hold, [weak = weak_from_this(), id] {
        if (const std::shared_ptr<Link> link = weak.lock()) {
          link->DropGrant(id);
        }
      });
  grants_.emplace(id, WriteGrant{std::move(pin).value(), timer});
  return id;
}

uint64_t Link::DropGrant(uint64_t id) {
  WriteGrant dropped;  // unpinned after the lock is gone
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto it = grants_.find(id);
  if (it != grants_.end()) {
    dropped = std::move(it->second);
    grants_.erase(it);
  }
  return dropped.expiry_timer;
}

Status Link::OnReleaseWriteOnLoop(const Frame &frame) {
  const Result<ReleaseWriteRequest> request = Decode<ReleaseWriteRequest>(frame.body);
  if (!request.ok()) {
    return request.status();
  }
  // An unknown id is normal: the grant may have expired.
  endpoint_->loop()->StopTimerOnLoop(DropGrant(request.value().grant));
  return Status::Ok();
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
