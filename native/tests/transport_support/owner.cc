#include "transport_support/owner.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>
#include <random>

#include "transport/pieces.h"

namespace datadist::test {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kCanaryBytes = 256;
constexpr uint8_t kCanary = 0xC5;
constexpr uint8_t kReused = 0xEE;

}  // namespace

std::vector<uint8_t> PatternOf(const CacheShape &shape, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<uint8_t> bytes(shape.num_tensors * shape.num_blocks * shape.stride);
  for (size_t i = 0; i < bytes.size(); i += sizeof(uint64_t)) {
    const uint64_t word = random();
    std::memcpy(&bytes[i], &word, std::min(sizeof(word), bytes.size() - i));
  }
  return bytes;
}

llm_datadist::CacheDesc DescOf(const CacheShape &shape) {
  llm_datadist::CacheDesc desc{};
  desc.num_tensors = shape.num_tensors;
  desc.data_type = llm_datadist::DT_UINT8;
  desc.shape = {static_cast<int64_t>(shape.num_blocks), static_cast<int64_t>(shape.stride)};
  return desc;
}

Arena::Arena(const CacheShape &shape) : tensor_bytes_(shape.num_blocks * shape.stride), allocation_bytes_(tensor_bytes_) {
  if (shape.distance > 0) {
    allocation_bytes_ += (shape.num_tensors - 1) * shape.distance;
    Allocate(allocation_bytes_);
  }
  for (uint32_t i = 0; i < shape.num_tensors; ++i) {
    tensors_.push_back(shape.distance > 0 ? allocations_[0] + i * shape.distance : Allocate(tensor_bytes_));
  }
}

uint8_t *Arena::Allocate(size_t bytes) {
  const size_t size = bytes + 2 * kCanaryBytes + kAlignment;
  memory_.push_back(std::make_unique<uint8_t[]>(size));
  std::memset(memory_.back().get(), kCanary, size);
  const uintptr_t first = reinterpret_cast<uintptr_t>(memory_.back().get()) + kCanaryBytes;
  allocations_.push_back(memory_.back().get() + kCanaryBytes + (kAlignment - first % kAlignment) % kAlignment);
  return allocations_.back();
}

void Arena::Fill(const std::vector<uint8_t> &bytes) {
  for (size_t i = 0; i < tensors_.size(); ++i) {
    std::memcpy(tensors_[i], &bytes[i * tensor_bytes_], tensor_bytes_);
  }
}

std::vector<uint8_t> Arena::Bytes() const {
  std::vector<uint8_t> bytes;
  for (const uint8_t *tensor : tensors_) {
    bytes.insert(bytes.end(), tensor, tensor + tensor_bytes_);
  }
  return bytes;
}

std::vector<uint64_t> Arena::Addrs() const {
  std::vector<uint64_t> addrs;
  for (const uint8_t *tensor : tensors_) {
    addrs.push_back(reinterpret_cast<uintptr_t>(tensor));
  }
  return addrs;
}

bool Arena::CanariesIntact() const {
  const auto intact = [](const uint8_t *first) {
    return std::all_of(first, first + kCanaryBytes, [](uint8_t byte) { return byte == kCanary; });
  };
  return std::all_of(allocations_.begin(), allocations_.end(), [&](const uint8_t *start) {
    return intact(start - kCanaryBytes) && intact(start + allocation_bytes_);
  });
}

RemoteCache OwnerHere::AddCache(const CacheShape &shape, uint64_t seed) {
  auto arena = std::make_unique<Arena>(shape);
  arena->Fill(PatternOf(shape, seed));
  const auto id = regions_->Register(DescOf(shape), arena->Addrs());
  EXPECT_TRUE(id.ok());
  const auto pin = regions_->Pin(id.value());
  const RegisteredCache &cache = pin.value().cache();
  arenas_[id.value()] = std::move(arena);
  return Told(cache);
}

void OwnerHere::UnregisterAndReuse(int64_t cache_id) {
  regions_->Unregister(cache_id);
  Arena &arena = *arenas_.at(cache_id);
  arena.Fill(std::vector<uint8_t>(arena.Bytes().size(), kReused));
}

std::vector<uint8_t> OwnerHere::Bytes(int64_t cache_id) {
  const auto pin = regions_->Pin(cache_id);  // after those who wrote under a pin
  EXPECT_TRUE(pin.ok());
  return arenas_.at(cache_id)->Bytes();
}

bool OwnerHere::CanariesIntact(int64_t cache_id) { return arenas_.at(cache_id)->CanariesIntact(); }

uint16_t OwnerHere::Listen() {
  listener_ = Fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  EXPECT_EQ(::bind(listener_.get(), reinterpret_cast<sockaddr *>(&address), size), 0);
  EXPECT_EQ(::listen(listener_.get(), SOMAXCONN), 0);
  EXPECT_EQ(::getsockname(listener_.get(), reinterpret_cast<sockaddr *>(&address), &size), 0);
  return ntohs(address.sin_port);
}

void OwnerHere::Serve(size_t connections, std::chrono::milliseconds max_request) {
  for (size_t i = 0; i < connections; ++i) {
    Fd stream(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    EXPECT_TRUE(stream);
    servers_.push_back(std::make_unique<TcpServer>(streams_, std::move(stream), regions_, 0, max_request));
  }
}

Status OwnerHere::ReadFrom(std::shared_ptr<const PeerProcess> initiator, const PushRequest &request) {
  const auto pin = regions_->Pin(request.cache_id);
  if (!pin.ok()) {
    return pin.status();
  }
  if (pin.value().cache().generation() != request.generation) {
    return Status(llm_datadist::LLM_KV_CACHE_NOT_EXIST, "another generation");
  }
  TransferOp op{&request.source, &pin.value(), request.source_first_tensor, request.first_tensor,
                request.tensor_count, request.runs};
  const auto path = MakeCmaDataPath(std::move(initiator), nullptr, std::make_shared<WorkerPool>(1));
  return path->Pull(op, Deadline::In(std::chrono::milliseconds(request.remaining_ms)));
}

Fd Dial(uint16_t port) {
  Fd stream(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  EXPECT_EQ(::connect(stream.get(), reinterpret_cast<sockaddr *>(&address), sizeof(address)), 0);
  return stream;
}

}  // namespace datadist::test
