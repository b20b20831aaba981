// The event loop and the session: order, deadlines, and every way in which a session ends.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <condition_variable>
#include <mutex>
#include <thread>

#include "control/event_loop.h"
#include "control/messages.h"
#include "control/session.h"
#include "support/frames.h"

namespace datadist {
namespace {

using testing::RecvFrame;
using testing::SendFrame;

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_TIMEOUT;
using ::testing::HasSubstr;
using std::chrono::milliseconds;

constexpr milliseconds kLong{30000};

TEST(EventLoop, RunsTasksInOrderAndTimersWhenDue) {
  EventLoop loop;
  ASSERT_TRUE(loop.Start().ok());
  std::vector<int> order;
  for (int i = 0; i < 3; ++i) {
    loop.Post([&order, i] { order.push_back(i); });
  }
  std::mutex mutex;
  std::condition_variable changed;
  bool late_ran = false;
  ASSERT_TRUE(loop.Run([&] {
    const auto now = EventLoop::Clock::now();
    loop.StartTimerOnLoop(now + milliseconds(20), [&] {
      const std::lock_guard<std::mutex> lock(mutex);
      order.push_back(5);
      late_ran = true;
      changed.notify_one();
    });
    loop.StartTimerOnLoop(now + milliseconds(5), [&] { order.push_back(4); });
    const uint64_t stopped = loop.StartTimerOnLoop(now + milliseconds(1), [&] { order.push_back(99); });
    loop.StopTimerOnLoop(stopped);
    order.push_back(3);
  }));
  std::unique_lock<std::mutex> lock(mutex);
  ASSERT_TRUE(changed.wait_for(lock, kLong, [&] { return late_ran; }));
  EXPECT_EQ(order, (std::vector<int>{0, 1, 2, 3, 4, 5}));
}

TEST(EventLoop, RefusesWorkWhenStopped) {
  EventLoop loop;
  EXPECT_FALSE(loop.Post([] {}));
  ASSERT_TRUE(loop.Start().ok());
  loop.Stop();
  loop.Stop();
  EXPECT_FALSE(loop.Post([] {}));
  EXPECT_FALSE(loop.Run([] {}));
}

TEST(EventLoop, StopReleasesWhoeverWaitsForATask) {
  for (int round = 0; round < 50; ++round) {
    EventLoop loop;
    ASSERT_TRUE(loop.Start().ok());
    std::thread caller([&loop] {
      while (loop.Run([] {})) {
      }
    });
    loop.Stop();
    caller.join();
  }
}

TEST(EventLoop, EventOfARemovedWatchIsDropped) {
  EventLoop loop;
  ASSERT_TRUE(loop.Start().ok());
  int pair[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
  const Fd a(pair[0]);
  const Fd b(pair[1]);
  int fired = 0;
  ASSERT_TRUE(loop.Run([&] {
    // Both become ready at once; whichever runs first removes the other, and itself.
    auto ids = std::make_shared<std::pair<uint64_t, uint64_t>>();
    const auto handler = [&loop, &fired, ids](uint32_t) {
      ++fired;
      loop.UnwatchOnLoop(ids->first);
      loop.UnwatchOnLoop(ids->second);
    };
    ids->first = loop.WatchOnLoop(a.get(), EPOLLOUT, handler);
    ids->second = loop.WatchOnLoop(b.get(), EPOLLOUT, handler);
  }));
  loop.Run([] {});
  loop.Stop();
  EXPECT_EQ(fired, 1);
}

class Recorder : public SessionHandler {
 public:
  Status OnRequestOnLoop(const Frame &frame) override {
    if (on_request) {
      return on_request(frame);
    }
    return Status(LLM_FAILED, "no requests here");
  }
  void OnClosedOnLoop(CloseCause cause, const std::string &reason) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    causes_.push_back(cause);
    reason_ = reason;
    changed_.notify_all();
  }
  bool WaitClosed() {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, kLong, [&] { return !causes_.empty(); });
  }
  std::vector<CloseCause> causes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return causes_;
  }
  std::string reason() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return reason_;
  }
  std::function<Status(const Frame &)> on_request;

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<CloseCause> causes_;
  std::string reason_;
};

class SessionTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(loop_->Start().ok());
    int pair[2];
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
    peer_ = Fd(pair[0]);
    session_ = Session::Create(loop_, Fd(pair[1]), heartbeat_);
  }
  void TearDown() override { loop_->Stop(); }
  void Send(MessageType type, uint32_t seq, const std::vector<uint8_t> &body = {}) {
    ASSERT_TRUE(SendFrame(peer_.get(), type, seq, body, Deadline::In(kLong)).ok());
  }
  milliseconds heartbeat_{kLong};
  const std::shared_ptr<EventLoop> loop_ = std::make_shared<EventLoop>();
  const std::shared_ptr<Recorder> handler_ = std::make_shared<Recorder>();
  Fd peer_;
  std::shared_ptr<Session> session_;
};

TEST_F(SessionTest, CallGetsTheAnswerWithItsSeq) {
  session_->Start(handler_);
  std::thread peer([this] {
    const Result<Frame> request = RecvFrame(peer_.get(), TypeSet(MessageType::kDescribe), Deadline::In(kLong));
    ASSERT_TRUE(request.ok());
    Send(MessageType::kCacheInfo, request.value().seq, {1, 2, 3});
  });
  const Result<Frame> answer = session_->Call(MessageType::kDescribe, Encode(DescribeRequest{CacheRef::Id(1)}),
                                              MessageType::kCacheInfo, Deadline::In(kLong));
  peer.join();
  ASSERT_TRUE(answer.ok()) << answer.status().text();
  EXPECT_EQ(answer.value().body, (std::vector<uint8_t>{1, 2, 3}));
}

TEST_F(SessionTest, CallEndsAtItsDeadlineAndTheLateAnswerIsDropped) {
  session_->Start(handler_);
  const Result<Frame> answer =
      session_->Call(MessageType::kDescribe, {}, MessageType::kCacheInfo, Deadline::In(milliseconds(20)));
  ASSERT_FALSE(answer.ok());
  EXPECT_EQ(answer.status().code(), LLM_TIMEOUT);
  Send(MessageType::kCacheInfo, 1);
  Send(MessageType::kPing, 7);
  ASSERT_TRUE(RecvFrame(peer_.get(), TypeSet(MessageType::kDescribe), Deadline::In(kLong)).ok());
  const Result<Frame> pong = RecvFrame(peer_.get(), TypeSet(MessageType::kPong), Deadline::In(kLong));
  ASSERT_TRUE(pong.ok()) << "the session lives on";
  EXPECT_EQ(pong.value().seq, 7U);
}

// One answer to each request, and none to what nobody asked.
TEST_F(SessionTest, AnswerToAnotherSeqClosesTheSession) {
  session_->Start(handler_);
  std::thread peer([this] {
    const Result<Frame> request = RecvFrame(peer_.get(), TypeSet(MessageType::kDescribe), Deadline::In(kLong));
    ASSERT_TRUE(request.ok());
    Send(MessageType::kCacheInfo, request.value().seq + 8);
  });
  EXPECT_FALSE(session_->Call(MessageType::kDescribe, {}, MessageType::kCacheInfo, Deadline::In(kLong)).ok());
  peer.join();
  ASSERT_TRUE(handler_->WaitClosed());
  EXPECT_THAT(handler_->reason(), HasSubstr("unasked CACHE_INFO"));
}

// A byte of a frame that never becomes whole, for each of our heartbeats.
TEST_F(SessionTest, PeerThatDripsIsSilent) {
  constexpr int kMostDrops = 60;
  int pair[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
  peer_ = Fd(pair[0]);
  const auto session = Session::Create(loop_, Fd(pair[1]), milliseconds(20));
  session->Start(handler_);
  const std::vector<uint8_t> frame = EncodeFrame(MessageType::kPush, 1, std::vector<uint8_t>(kMostDrops));
  int drops = 0;
  while (drops < kMostDrops &&
         RecvFrame(peer_.get(), TypeSet(MessageType::kPing), Deadline::In(kLong)).ok()) {
    (void)::send(peer_.get(), &frame[static_cast<size_t>(drops)], 1, MSG_NOSIGNAL);
    ++drops;
  }
  ASSERT_LT(drops, kMostDrops) << "it may drip for ever";
  ASSERT_TRUE(handler_->WaitClosed());
  EXPECT_EQ(handler_->causes(), std::vector<CloseCause>{CloseCause::kSilent});
}

TEST_F(SessionTest, PeerThatClosesWakesTheCaller) {
  session_->Start(handler_);
  std::thread peer([this] {
    ASSERT_TRUE(RecvFrame(peer_.get(), TypeSet(MessageType::kDescribe), Deadline::In(kLong)).ok());
    peer_.Reset();
  });
  const Result<Frame> answer =
      session_->Call(MessageType::kDescribe, {}, MessageType::kCacheInfo, Deadline::In(kLong));
  peer.join();
  ASSERT_FALSE(answer.ok());
  EXPECT_EQ(answer.status().code(), LLM_FAILED);
  ASSERT_TRUE(handler_->WaitClosed());
  EXPECT_EQ(handler_->causes(), std::vector<CloseCause>{CloseCause::kByPeer});
  EXPECT_FALSE(session_->Call(MessageType::kDescribe, {}, MessageType::kCacheInfo, Deadline::In(kLong)).ok());
}

TEST_F(SessionTest, ProtocolViolationsCloseTheSession) {
  struct Case {
    const char *expected;
    MessageType type;
    uint32_t seq;
    std::vector<uint8_t> body;
  };
  for (const Case &bad : {Case{"not legal", MessageType::kHello, 1, {}}, Case{"not legal", MessageType::kPushed, 9, {}},
                          Case{"malformed", MessageType::kPing, 1, {0}},
                          Case{"no requests", MessageType::kUnlink, 1, {}}}) {
    int pair[2];
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
    peer_ = Fd(pair[0]);
    const auto handler = std::make_shared<Recorder>();
    const auto session = Session::Create(loop_, Fd(pair[1]), heartbeat_);
    session->Start(handler);
    Send(bad.type, bad.seq, bad.body);
    ASSERT_TRUE(handler->WaitClosed()) << bad.expected;
    EXPECT_EQ(handler->causes(), std::vector<CloseCause>{CloseCause::kProtocol});
    EXPECT_THAT(handler->reason(), HasSubstr(bad.expected));
  }
}

TEST_F(SessionTest, ClosedBeforeItStartedIsReportedOnce) {
  session_->Close(CloseCause::kByUs, "early");
  session_->Start(handler_);
  session_->Close(CloseCause::kByUs, "again");
  ASSERT_TRUE(handler_->WaitClosed());
  loop_->Run([] {});
  EXPECT_EQ(handler_->causes(), std::vector<CloseCause>{CloseCause::kByUs});
  EXPECT_EQ(handler_->reason(), "early");
}

TEST_F(SessionTest, PeerThatDoesNotReadIsCutOff) {
  session_->Start(handler_);
  const std::vector<uint8_t> body(1U << 20, 1);
  // Socket buffers take some, the outbox 4 MiB; far less than this.
  for (int i = 0; i < 64 && handler_->causes().empty(); ++i) {
    session_->Send(MessageType::kCacheInfo, 1, body);
  }
  ASSERT_TRUE(handler_->WaitClosed());
  EXPECT_THAT(handler_->reason(), HasSubstr("does not read"));
}

TEST_F(SessionTest, LargeAnswersGoOutThroughASlowReader) {
  session_->Start(handler_);
  const std::vector<uint8_t> body(1U << 20, 3);
  session_->Send(MessageType::kCacheInfo, 1, body);
  session_->Send(MessageType::kCacheInfo, 2, body);
  for (uint32_t seq = 1; seq <= 2; ++seq) {
    const Result<Frame> frame = RecvFrame(peer_.get(), TypeSet(MessageType::kCacheInfo), Deadline::In(kLong));
    ASSERT_TRUE(frame.ok()) << frame.status().text();
    EXPECT_EQ(frame.value().seq, seq);
    EXPECT_EQ(frame.value().body, body);
  }
}

class SilentPeer : public SessionTest {
 protected:
  SilentPeer() { heartbeat_ = milliseconds(20); }
};

TEST_F(SilentPeer, IsLostAfterThreePings) {
  session_->Start(handler_);
  ASSERT_TRUE(handler_->WaitClosed());
  EXPECT_EQ(handler_->causes(), std::vector<CloseCause>{CloseCause::kSilent});
  EXPECT_THAT(handler_->reason(), HasSubstr("60 ms"));
  for (int i = 0; i < 3; ++i) {
    EXPECT_TRUE(RecvFrame(peer_.get(), TypeSet(MessageType::kPing), Deadline::In(kLong)).ok());
  }
  EXPECT_FALSE(RecvFrame(peer_.get(), TypeSet(MessageType::kPing), Deadline::In(kLong)).ok());
}

class AnsweringPeer : public SessionTest {
 protected:
  AnsweringPeer() { heartbeat_ = milliseconds(400); }  // three of them are enough for an answer on a busy machine
};

TEST_F(AnsweringPeer, IsNotLost) {
  session_->Start(handler_);
  for (int i = 0; i < 5; ++i) {
    const Result<Frame> ping = RecvFrame(peer_.get(), TypeSet(MessageType::kPing), Deadline::In(kLong));
    ASSERT_TRUE(ping.ok()) << ping.status().text();
    Send(MessageType::kPong, ping.value().seq);
  }
  EXPECT_TRUE(handler_->causes().empty());
}

}  // namespace
}  // namespace datadist
