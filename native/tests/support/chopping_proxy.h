// Forwards the connections of a port to another; after a given number of bytes it cuts everything, or flips one bit.
#ifndef DATADIST_TESTS_SUPPORT_CHOPPING_PROXY_H_
#define DATADIST_TESTS_SUPPORT_CHOPPING_PROXY_H_

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

#include "control/address.h"

namespace datadist::testing {

class ChoppingProxy {
 public:
  enum class Fault { kCut, kFlip };
  ChoppingProxy(uint16_t target, uint64_t byte_limit, Fault fault = Fault::kCut)
      : target_(SocketAddress::FromIp("127.0.0.1", target).value()), fault_(fault), left_(byte_limit) {
    listener_ = std::move(Listen(SocketAddress::FromIp("127.0.0.1", 0).value()).value().tcp);
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, stop_) != 0) {
      ::abort();
    }
    thread_ = std::thread([this] { Forward(); });
  }
  ~ChoppingProxy() {
    ::shutdown(stop_[0], SHUT_RDWR);
    thread_.join();
    ::close(stop_[0]);
    ::close(stop_[1]);
  }
  ChoppingProxy(const ChoppingProxy &) = delete;
  ChoppingProxy &operator=(const ChoppingProxy &) = delete;

  uint16_t port() const { return SocketAddress::LocalOf(listener_.get()).port(); }
  bool cut() const { return cut_.load(); }
  bool flipped() const { return flipped_.load(); }

 private:
  void Forward() {
    while (!cut_.load()) {
      std::vector<pollfd> waits = {{stop_[1], POLLIN, 0}, {listener_.get(), POLLIN, 0}};
      for (const auto &[from, to] : pipes_) {
        waits.push_back({from.get(), POLLIN, 0});
        waits.push_back({to.get(), POLLIN, 0});
      }
      ::poll(waits.data(), waits.size(), -1);
      if (waits[0].revents != 0) {
        return;
      }
      for (size_t i = 2; i < waits.size(); ++i) {
        if (waits[i].revents != 0) {
          Move(waits[i].fd, waits[i % 2 == 0 ? i + 1 : i - 1].fd);
        }
      }
      if (waits[1].revents != 0) {
        Fd accepted(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
        Result<Fd> dialled = DialTcp(target_, Deadline::In(std::chrono::seconds(5)));
        if (accepted && dialled.ok()) {
          pipes_.emplace_back(std::move(accepted), std::move(dialled).value());
        }
      }
    }
    pipes_.clear();
    listener_.Reset();
  }

  void Move(int from, int to) {
    std::array<char, 4096> buffer;
    const uint64_t most = flipped_.load() ? buffer.size() : std::min<uint64_t>(buffer.size(), left_);
    const ssize_t size = ::recv(from, buffer.data(), most, MSG_DONTWAIT);
    if (size > 0) {
      if (fault_ == Fault::kFlip && !flipped_.load() && static_cast<uint64_t>(size) == left_) {
        buffer[static_cast<size_t>(size) - 1] = static_cast<char>(buffer[static_cast<size_t>(size) - 1] ^ 1);
        flipped_.store(true);
      }
      ::send(to, buffer.data(), static_cast<size_t>(size), MSG_NOSIGNAL);
      left_ -= static_cast<uint64_t>(size);
    } else {
      ::shutdown(to, SHUT_WR);
      ::shutdown(from, SHUT_RD);
    }
    if (left_ == 0 && fault_ == Fault::kCut) {
      cut_.store(true);
    }
  }

  const SocketAddress target_;
  const Fault fault_;
  uint64_t left_;
  std::atomic<bool> cut_{false};
  std::atomic<bool> flipped_{false};
  Fd listener_;
  int stop_[2] = {-1, -1};
  std::vector<std::pair<Fd, Fd>> pipes_;
  std::thread thread_;
};

}  // namespace datadist::testing

#endif  // DATADIST_TESTS_SUPPORT_CHOPPING_PROXY_H_
