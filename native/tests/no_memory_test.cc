// Memory runs out on a thread of ours: that costs what needed it, not the process.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <atomic>
#include <cstdlib>
#include <limits>
#include <new>
#include <thread>

#include "base/task_runner.h"
#include "base/worker_pool.h"
#include "control/event_loop.h"
#include "control/messages.h"
#include "base/socket_io.h"
#include "control/session.h"
#include "support/comm_members.h"
#include "support/frames.h"
#include "support/member.h"
#include "transport_support/requests.h"

namespace {

std::atomic<size_t> smallest_refused{std::numeric_limits<size_t>::max()};

// Larger pieces of memory do not exist while one of these lives.
class NoMemoryFrom {
 public:
  explicit NoMemoryFrom(size_t size) { smallest_refused.store(size); }
  ~NoMemoryFrom() { smallest_refused.store(std::numeric_limits<size_t>::max()); }
  NoMemoryFrom(const NoMemoryFrom &) = delete;
  NoMemoryFrom &operator=(const NoMemoryFrom &) = delete;
};

}  // namespace

void *operator new(size_t size) {
  void *const memory = size < smallest_refused.load() ? std::malloc(size) : nullptr;
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  return memory;
}
void operator delete(void *memory) noexcept { std::free(memory); }
void operator delete(void *memory, size_t) noexcept { std::free(memory); }

namespace datadist::testing {
namespace {

TEST(NoMemory, OnTheLoopEndsATask) {
  EventLoop loop;
  ASSERT_TRUE(loop.Start().ok());
  loop.Post([] { throw std::bad_alloc(); });
  EXPECT_FALSE(loop.Run([] { throw std::bad_alloc(); })) << "who waits for a task that failed is told";
  EXPECT_TRUE(loop.Run([] {}));
}

TEST(NoMemory, OnAThreadOfThePoolReachesTheCaller) {
  WorkerPool pool(2);
  std::atomic<int> ran{0};
  const auto part = [&](size_t index) {
    ++ran;
    if (index == 1) {
      throw std::bad_alloc();
    }
  };
  EXPECT_THROW(pool.Run(8, part), std::bad_alloc);
  EXPECT_EQ(ran.load(), 8);
  pool.Run(8, [](size_t) {});
}

TEST(NoMemory, OfATaskCostsNoOtherTask) {
  TaskRunner runner(1);
  std::atomic<bool> ran{false};
  ASSERT_TRUE(runner.Post([] { throw std::bad_alloc(); }));
  ASSERT_TRUE(runner.Post([&] { ran.store(true); }));
  EXPECT_TRUE(Eventually([&] { return ran.load(); }));
  runner.Stop();
  EXPECT_FALSE(runner.Post([] {}));
}

// The first bytes of a frame whose body is as long as its type allows.
std::vector<uint8_t> LongFrame(MessageType type) {
  return EncodeFrame(type, 1, std::vector<uint8_t>(BodyCap(type)));
}

class Ends : public SessionHandler {
 public:
  Status OnRequestOnLoop(const Frame &) override { return Status::Ok(); }
  void OnClosedOnLoop(CloseCause, const std::string &) override { closed.store(true); }
  std::atomic<bool> closed{false};
};

TEST(NoMemory, ForAFrameEndsItsSessionAlone) {
  const auto loop = std::make_shared<EventLoop>();
  ASSERT_TRUE(loop->Start().ok());
  int pairs[2][2];
  std::shared_ptr<Session> sessions[2];
  const std::shared_ptr<Ends> ends[2] = {std::make_shared<Ends>(), std::make_shared<Ends>()};
  for (int i = 0; i < 2; ++i) {
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pairs[i]), 0);
    sessions[i] = Session::Create(loop, Fd(pairs[i][1]), std::chrono::seconds(60));
    sessions[i]->Start(ends[i]);
  }
  const Fd hungry(pairs[0][0]);
  const Fd other(pairs[1][0]);
  const std::vector<uint8_t> frame = LongFrame(MessageType::kPush);
  {
    const NoMemoryFrom none(kFirstBodyBytes);
    ASSERT_EQ(::send(hungry.get(), frame.data(), kFrameHeaderSize, MSG_NOSIGNAL),
              static_cast<ssize_t>(kFrameHeaderSize));
    EXPECT_TRUE(Eventually([&] { return ends[0]->closed.load(); }));
  }
  ASSERT_TRUE(SendFrame(other.get(), MessageType::kPing, 7, {}, Deadline::In(kPatience)).ok());
  EXPECT_TRUE(RecvFrame(other.get(), TypeSet(MessageType::kPong), Deadline::In(kPatience)).ok());
  EXPECT_FALSE(ends[1]->closed.load());
  loop->Stop();
}

TEST(NoMemory, ForAGreetingEndsThatConnectionAlone) {
  Member server(2);
  const SocketAddress address = server.Listen();
  const Fd hungry = DialTcp(address, Deadline::In(kPatience)).value();
  const std::vector<uint8_t> frame = LongFrame(MessageType::kHello);
  {
    const NoMemoryFrom none(BodyCap(MessageType::kHello));
    ASSERT_EQ(::send(hungry.get(), frame.data(), kFrameHeaderSize, MSG_NOSIGNAL),
              static_cast<ssize_t>(kFrameHeaderSize));
    char byte = 0;
    EXPECT_EQ(RecvAll(hungry.get(), &byte, 1, Deadline::In(kPatience)).code(), llm_datadist::LLM_FAILED) << "closed";
  }
  Member client(1);
  EXPECT_TRUE(client.Dial(address, 2).ok());
}

// Less than what a dial takes, and more than it takes to ask.
constexpr size_t kBytesOfADial = 150;

TEST(NoMemory, ToDialFailsTheCommAlone) {
  Member self(2);
  const int64_t id = MustLink(self, "absent", Members(2));
  {
    const NoMemoryFrom none(kBytesOfADial);
    EXPECT_EQ(self.Settled(id).state, CommState::kFailed);
  }
  ExpectOk(self, MustLink(self, "loop", WithoutAddresses(Members(2))));
  EXPECT_TRUE(self.comms().Unlink(id).ok());
}

TEST(NoMemory, ForAListOfSpansEndsThatDataConnectionAlone) {
  test::OwnerHere owner;
  const RemoteCache cache = owner.AddCache({2, 4, 64}, 1);
  const uint16_t port = owner.Listen();
  const Fd hungry = test::Dial(port);
  const Fd other = test::Dial(port);
  owner.Serve(2, kPatience);
  RequestHeader header = test::GoodHeader(cache);
  header.span_count = kMaxSpansPerRequest;
  header.total_bytes = 2 * uint64_t{header.span_count};
  const auto request = test::Encoded(header, std::vector<Span>(header.span_count, Span{0, 1}));
  {
    const NoMemoryFrom none(request.size() / 2);
    (void)SendAll(hungry.get(), request.data(), request.size(), Deadline::In(kPatience));
    char byte = 0;
    EXPECT_EQ(RecvAll(hungry.get(), &byte, 1, Deadline::In(kPatience)).code(), llm_datadist::LLM_FAILED) << "closed";
  }
  const auto modest = test::Encoded(test::GoodHeader(cache), {{0, 64}});
  ASSERT_TRUE(SendAll(other.get(), modest.data(), modest.size(), Deadline::In(kPatience)).ok());
  uint8_t bytes[kResponseHeaderBytes];
  EXPECT_TRUE(RecvAll(other.get(), bytes, sizeof(bytes), Deadline::In(kPatience)).ok());
}

}  // namespace
}  // namespace datadist::testing
