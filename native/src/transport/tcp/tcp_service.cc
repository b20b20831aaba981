#include "transport/tcp/tcp_service.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <exception>
#include <memory>
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

}  // namespace

struct TcpServer::Served {
  Served(Fd given, std::shared_ptr<RegionTable> regions, uint64_t peer, std::chrono::milliseconds max_request)
      : stream(std::move(given)), connection(std::in_place, stream.get(), std::move(regions), peer, max_request) {}

  void Shut() { (void)::shutdown(stream.get(), SHUT_RDWR); }

  Fd stream;               // closed with its TcpServer only: Close may come at any time
  Worker *worker = nullptr;
  bool ended = false;      // guarded by State::mutex_

  // Of its worker's thread.
  std::optional<TcpConnection> connection;  // none once ended
  TcpConnection::Next awaited = TcpConnection::Next::kRead;
  std::optional<Clock::time_point> due;  // its entry in Worker::due
};

// A thread and what it serves.
struct TcpServer::Worker {
  Fd epoll;
  std::thread thread;
  std::set<Served *> served;  // guarded by State::mutex_
  // Requests that have not ended, by deadline. Of the thread.
  std::set<std::pair<Clock::time_point, Served *>> due;
};

class TcpService::State {
 public:
  using Served = TcpServer::Served;
  using Worker = TcpServer::Worker;
  using Next = TcpConnection::Next;

  explicit State(size_t max_threads) : max_threads_(max_threads), stop_(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
    workers_.reserve(max_threads);
  }

  void Add(Served *served) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      served->worker = stopping_ ? nullptr : FindWorkerLocked();
      if (served->worker != nullptr) {
        served->worker->served.insert(served);
        if (Watch(*served, EPOLL_CTL_ADD)) {
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
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    const uint64_t one = 1;
    (void)!::write(stop_.get(), &one, sizeof(one));
    for (const auto &worker : workers_) {  // stopping: there will be no more
      if (worker->thread.joinable()) {
        worker->thread.join();
      }
      while (!worker->served.empty()) {
        End(*worker->served.begin());
      }
    }
  }

 private:
  // The one with the fewest connections; a new one while all have some, within the limit. Null: there is none.
  Worker *FindWorkerLocked() {
    const auto fewest = std::min_element(workers_.begin(), workers_.end(), [](const auto &a, const auto &b) {
      return a->served.size() < b->served.size();
    });
    if (fewest != workers_.end() && ((*fewest)->served.empty() || workers_.size() == max_threads_)) {
      return fewest->get();
    }
    if (std::unique_ptr<Worker> fresh = StartWorker()) {
      workers_.push_back(std::move(fresh));
      return workers_.back().get();
    }
    return fewest != workers_.end() ? fewest->get() : nullptr;
  }

  std::unique_ptr<Worker> StartWorker() {
    auto worker = std::make_unique<Worker>();
    worker->epoll = Fd(::epoll_create1(EPOLL_CLOEXEC));
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.ptr = nullptr;
    if (!stop_ || ::epoll_ctl(worker->epoll.get(), EPOLL_CTL_ADD, stop_.get(), &event) != 0) {
      return nullptr;
    }
    try {
      worker->thread = std::thread([this, raw = worker.get()] { ThreadMain(*raw); });
    } catch (const std::system_error &) {
      return nullptr;
    }
    return worker;
  }

  static bool Watch(Served &served, int operation) {
    epoll_event event{};
    event.events = served.awaited == Next::kWrite ? EPOLLOUT : EPOLLIN;
    event.data.ptr = &served;
    return ::epoll_ctl(served.worker->epoll.get(), operation, served.stream.get(), &event) == 0;
  }

  void ThreadMain(Worker &worker) {
    while (true) {
      // One at a time: who has more to do than a turn goes behind those that are ready.
      epoll_event event{};
      const int ready = ::epoll_wait(worker.epoll.get(), &event, 1, WaitMillis(worker));
      if (ready <= 0) {
        continue;
      }
      if (event.data.ptr == nullptr) {
        return;
      }
      auto *const served = static_cast<Served *>(event.data.ptr);
      if (!TakeTurn(worker, *served)) {
        End(served);
      }
    }
  }

  // False: it has come to its end.
  static bool TakeTurn(Worker &worker, Served &served) {
    try {
      const Next next = served.connection->Serve();
      if (next == Next::kEnd) {
        return false;
      }
      const auto &deadline = served.connection->deadline();
      const auto due = deadline.has_value() ? std::make_optional(deadline->at()) : std::nullopt;
      if (due != served.due) {
        Forget(worker, served);
        if (due.has_value()) {
          worker.due.emplace(*due, &served);
          served.due = due;
        }
      }
      return std::exchange(served.awaited, next) == next || Watch(served, EPOLL_CTL_MOD);
    } catch (const std::exception &error) {
      Log(LogLevel::kError, std::string("data connection: ") + error.what());
      return false;
    }
  }

  static void Forget(Worker &worker, Served &served) {
    if (served.due.has_value()) {
      worker.due.erase({*served.due, &served});
      served.due.reset();
    }
  }

  // Until the next request is due. Those whose time is over are shut, which gives them the turn that ends them.
  static int WaitMillis(Worker &worker) {
    constexpr int kForever = -1;
    constexpr std::chrono::milliseconds kLongest = std::chrono::hours(1);
    if (worker.due.empty()) {
      return kForever;
    }
    const auto now = Clock::now();
    while (!worker.due.empty() && worker.due.begin()->first <= now) {
      Served &late = *worker.due.begin()->second;
      Forget(worker, late);
      late.Shut();
    }
    if (worker.due.empty()) {
      return kForever;
    }
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(worker.due.begin()->first - now);
    return static_cast<int>(std::min(left, kLongest).count());
  }

  // On its worker's thread, or where there is none. The last that touches it: its TcpServer may go at once.
  void End(Served *served) {
    served->connection.reset();  // lets go of the cache, whose owner may be told on this thread
    served->Shut();              // the peer must not wait for an answer that never comes
    const std::lock_guard<std::mutex> lock(mutex_);
    if (Worker *const worker = served->worker) {
      (void)::epoll_ctl(worker->epoll.get(), EPOLL_CTL_DEL, served->stream.get(), nullptr);
      Forget(*worker, *served);
      worker->served.erase(served);
    }
    served->ended = true;
    ended_.notify_all();
  }

  const size_t max_threads_;
  const Fd stop_;  // stays readable once written: every thread hears of it
  std::mutex stop_mutex_;  // taken before mutex_
  std::mutex mutex_;
  std::condition_variable ended_;
  std::vector<std::unique_ptr<Worker>> workers_;  // guarded by mutex_; grows until stopping
  bool stopping_ = false;                         // guarded by mutex_
};

TcpService::TcpService(size_t max_threads) : state_(std::make_shared<State>(max_threads)) {}

TcpService::~TcpService() { Stop(); }

void TcpService::Stop() { state_->Stop(); }

TcpServer::TcpServer(const TcpService &service, Fd stream, std::shared_ptr<RegionTable> regions, uint64_t peer,
                     std::chrono::milliseconds max_request)
    : service_(service.state_),
      served_(std::make_unique<Served>(std::move(stream), std::move(regions), peer, max_request)) {
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
