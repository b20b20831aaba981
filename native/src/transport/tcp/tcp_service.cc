#include "transport/tcp/tcp_service.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "base/log.h"
#include "transport/tcp/connection.h"

namespace datadist {
namespace {

using Clock = Deadline::Clock;

constexpr int kForever = -1;

}  // namespace

// At any time one of: watched, in the hands of one thread, or ended.
struct TcpServer::Served {
  Served(Fd given, std::shared_ptr<RegionTable> regions, std::chrono::milliseconds max_request)
      : stream(std::move(given)), connection(std::in_place, stream.get(), std::move(regions), max_request) {}

  void Shut() { (void)::shutdown(stream.get(), SHUT_RDWR); }

  Fd stream;                                // closed with its TcpServer only: Close may come at any time
  std::optional<TcpConnection> connection;  // none once ended
  std::optional<Clock::time_point> due;     // its entry in State::waiting_
  bool ended = false;                       // guarded by State::mutex_
};

class TcpService::State {
 public:
  using Served = TcpServer::Served;

  explicit State(size_t max_threads) : max_threads_(max_threads) {
    epoll_ = Fd(::epoll_create1(EPOLL_CLOEXEC));
    stop_ = Fd(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.ptr = nullptr;  // stays readable: every thread hears of it
    (void)::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, stop_.get(), &event);
  }

  void Add(Served *served) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!stopping_ && HasThreadLocked(all_.size() + 1)) {
        all_.insert(served);
        if (Watch(served, EPOLL_CTL_ADD, EPOLLIN)) {
          return;
        }
      }
    }
    End(served);
  }

  void AwaitEnd(const Served *served) {
    std::unique_lock<std::mutex> lock(mutex_);
    ended_.wait(lock, [served] { return served->ended; });
  }

  void Stop() {
    const std::lock_guard<std::mutex> one_at_a_time(stop_mutex_);
    std::vector<std::thread> threads;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
      threads.swap(threads_);
    }
    const uint64_t one = 1;
    (void)!::write(stop_.get(), &one, sizeof(one));
    for (std::thread &thread : threads) {
      thread.join();
    }
    while (Served *const served = AnyLeft()) {
      End(served);
    }
  }

 private:
  // Starts a thread for `wanted` connections where there are fewer, within the limit. False: there is none.
  bool HasThreadLocked(size_t wanted) {
    if (!epoll_ || !stop_) {
      return false;
    }
    if (threads_.size() < std::min(wanted, max_threads_)) {
      try {
        threads_.emplace_back([this] { ThreadMain(); });
      } catch (const std::system_error &) {
        // Those that there are serve it too.
      }
    }
    return !threads_.empty();
  }

  Served *AnyLeft() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return all_.empty() ? nullptr : *all_.begin();
  }

  bool Watch(Served *served, int operation, uint32_t events) {
    epoll_event event{};
    event.events = events | EPOLLONESHOT;
    event.data.ptr = served;
    return ::epoll_ctl(epoll_.get(), operation, served->stream.get(), &event) == 0;
  }

  void ThreadMain() {
    Served *mine = nullptr;  // one whose turn is over, and that has more to do at once
    TcpConnection::Next next{};
    while (true) {
      epoll_event event{};
      const int wait = WaitMillis();
      const int ready = ::epoll_wait(epoll_.get(), &event, 1, mine != nullptr ? 0 : wait);
      if (ready > 0 && event.data.ptr == nullptr) {
        return;
      }
      if (ready > 0) {
        if (mine != nullptr) {
          GiveBack(mine, next);  // behind those that are ready
        }
        mine = static_cast<Served *>(event.data.ptr);
        Forget(mine);
      }
      if (mine != nullptr && !TakeTurn(mine, next)) {
        mine = nullptr;
      }
    }
  }

  // True where it could go on at once.
  bool TakeTurn(Served *served, TcpConnection::Next &next) {
    bool turn_over = false;
    try {
      const TcpConnection::Outcome outcome = served->connection->Serve();
      next = outcome.next;
      turn_over = outcome.turn_over;
    } catch (const std::exception &error) {
      Log(LogLevel::kError, std::string("data connection: ") + error.what());
      next = TcpConnection::Next::kEnd;
    }
    if (!turn_over) {
      GiveBack(served, next);
    }
    return turn_over;
  }

  void GiveBack(Served *served, TcpConnection::Next next) {
    try {
      if (next != TcpConnection::Next::kEnd && Await(served, next)) {
        return;
      }
    } catch (const std::exception &error) {
      Log(LogLevel::kError, std::string("data connection: ") + error.what());
    }
    End(served);
  }

  // Others may have it from here on, where it says true.
  bool Await(Served *served, TcpConnection::Next next) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const auto &deadline = served->connection->deadline()) {
      waiting_.emplace(deadline->at(), served);
      served->due = deadline->at();
    }
    return Watch(served, EPOLL_CTL_MOD, next == TcpConnection::Next::kWrite ? EPOLLOUT : EPOLLIN);
  }

  void Forget(Served *served) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ForgetLocked(served);
  }

  void ForgetLocked(Served *served) {
    if (served->due.has_value()) {
      waiting_.erase({*served->due, served});
      served->due.reset();
    }
  }

  // Until the next request is due. Those whose time is over are shut: whose turn that makes it ends them.
  int WaitMillis() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto now = Clock::now();
    while (!waiting_.empty() && waiting_.begin()->first <= now) {
      Served *const served = waiting_.begin()->second;
      ForgetLocked(served);
      served->Shut();
    }
    if (waiting_.empty()) {
      return kForever;
    }
    constexpr std::chrono::milliseconds kLongest = std::chrono::hours(1);
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(waiting_.begin()->first - now);
    return static_cast<int>(std::min(left, kLongest).count());
  }

  // The last that is done with it: its TcpServer may go at once.
  void End(Served *served) {
    served->connection.reset();  // lets go of the cache, whose owner may be told on this thread
    served->Shut();              // the peer must not wait for an answer that never comes
    const std::lock_guard<std::mutex> lock(mutex_);
    (void)::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, served->stream.get(), nullptr);
    ForgetLocked(served);
    all_.erase(served);
    served->ended = true;
    ended_.notify_all();
  }

  const size_t max_threads_;
  Fd epoll_;
  Fd stop_;
  std::mutex stop_mutex_;  // taken before mutex_
  std::mutex mutex_;
  std::condition_variable ended_;
  std::vector<std::thread> threads_;                       // guarded by mutex_
  std::set<Served *> all_;                                 // guarded by mutex_
  std::set<std::pair<Clock::time_point, Served *>> waiting_;  // for their peers, with a deadline; guarded by mutex_
  bool stopping_ = false;                                  // guarded by mutex_
};

TcpService::TcpService(size_t max_threads) : state_(std::make_shared<State>(max_threads)) {}

TcpService::~TcpService() { Stop(); }

void TcpService::Stop() { state_->Stop(); }

TcpServer::TcpServer(const TcpService &service, Fd stream, std::shared_ptr<RegionTable> regions,
                     std::chrono::milliseconds max_request)
    : service_(service.state_),
      served_(std::make_unique<Served>(std::move(stream), std::move(regions), max_request)) {
  TuneStream(served_->stream.get());
  service_->Add(served_.get());
}

TcpServer::~TcpServer() {
  Close();
  Join();
}

void TcpServer::Close() { served_->Shut(); }

void TcpServer::Join() { service_->AwaitEnd(served_.get()); }

}  // namespace datadist
