#include "link/comm_listeners.h"

#include <utility>

namespace datadist {

CommListeners::Lease &CommListeners::Lease::operator=(Lease &&other) noexcept {
  std::swap(owner_, other.owner_);
  std::swap(key_, other.key_);
  return *this;
}

CommListeners::Lease::~Lease() {
  if (owner_ != nullptr) {
    owner_->Close(key_);
  }
}

void CommListeners::SetServerAddress(std::optional<SocketAddress> address) {
  const std::lock_guard<std::mutex> lock(mutex_);
  server_ = std::move(address);
}

bool CommListeners::ServerCoversLocked(const SocketAddress &address) const {
  if (!server_.has_value() || server_->port() != address.port() || server_->family() != address.family()) {
    return false;
  }
  const std::string server = server_->ToString();
  const bool any = server.rfind("0.0.0.0:", 0) == 0 || server.rfind("[::]:", 0) == 0;
  return any || server == address.ToString();
}

Result<CommListeners::Lease> CommListeners::Open(const SocketAddress &address) {
  const std::string key = address.ToString();
  const std::lock_guard<std::mutex> lock(mutex_);
  if (ServerCoversLocked(address)) {
    return Lease();
  }
  if (const auto it = by_address_.find(key); it != by_address_.end()) {
    ++it->second.leases;
    return Lease(this, key);
  }
  Result<Listeners> listeners = ListenOpen(address, endpoint_->options().trust);
  if (!listeners.ok()) {
    return listeners.status();
  }
  const auto acceptor = std::make_shared<Acceptor>(endpoint_, table_, Admits::kComms);
  if (!endpoint_->loop()->Run([&] { acceptor->StartOnLoop(std::move(listeners).value()); })) {
    return Status(llm_datadist::LLM_FAILED, "the event loop ended");
  }
  by_address_[key] = Shared{acceptor, 1};
  return Lease(this, key);
}

void CommListeners::Close(const std::string &key) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto it = by_address_.find(key);
  if (--it->second.leases == 0) {
    endpoint_->loop()->Run([&] { it->second.acceptor->StopOnLoop(); });
    by_address_.erase(it);
  }
}

}  // namespace datadist
