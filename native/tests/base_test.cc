// Byte codec, checked arithmetic, checksum, socket I/O, worker pool.
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <numeric>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "base/bytes.h"
#include "base/checked.h"
#include "base/crc32c.h"
#include "base/fd.h"
#include "base/socket_io.h"
#include "base/status.h"
#include "base/text.h"
#include "base/worker_pool.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_TIMEOUT;
using std::chrono::milliseconds;
using std::chrono::seconds;

Deadline Soon() { return Deadline::In(seconds(30)); }

// ---- bytes ----

TEST(Bytes, LittleEndianRoundTrip) {
  Writer out;
  out.U8(1);
  out.U16(0x0203);
  out.U32(0x04050607);
  out.U64(0x08090A0B0C0D0E0F);
  out.I32(-2);
  out.I64(-3);
  out.Text("hello", 100);
  out.PatchU32(3, 0x11121314);
  const std::vector<uint8_t> expected_start = {1, 3, 2, 0x14, 0x13, 0x12, 0x11, 0x0F, 0x0E};
  EXPECT_TRUE(std::equal(expected_start.begin(), expected_start.end(), out.data()));
  Reader in(out.data(), out.size());
  EXPECT_EQ(in.U8(), 1U);
  EXPECT_EQ(in.U16(), 0x0203U);
  EXPECT_EQ(in.U32(), 0x11121314U);
  EXPECT_EQ(in.U64(), 0x08090A0B0C0D0E0FU);
  EXPECT_EQ(in.I32(), -2);
  EXPECT_EQ(in.I64(), -3);
  EXPECT_EQ(in.Text(100), "hello");
  EXPECT_TRUE(in.Finished());
}

TEST(Bytes, ReadingPastTheEndFailsForGood) {
  const uint8_t bytes[] = {1, 2, 3};
  Reader in(bytes, sizeof(bytes));
  EXPECT_EQ(in.U32(), 0U);
  EXPECT_FALSE(in.ok());
  EXPECT_EQ(in.U8(), 0U) << "also what would still have fitted";
  uint8_t out[2] = {9, 9};
  in.Bytes(out, sizeof(out));
  EXPECT_EQ(out[0] + out[1], 0);
  EXPECT_FALSE(in.Finished());
}

TEST(Bytes, TextsAreBounded) {
  Writer out;
  out.Text(std::string(100'000, 'x'), 1'000'000);
  EXPECT_EQ(out.size(), 2U + 65535U);
  Reader too_long(out.data(), out.size());
  EXPECT_EQ(too_long.Text(65534), "");
  EXPECT_FALSE(too_long.ok());
  Reader cut(out.data(), 100);
  EXPECT_EQ(cut.Text(65535), "");
  EXPECT_FALSE(cut.ok());
}

TEST(Checked, Arithmetic) {
  constexpr uint64_t kMax = ~uint64_t{0};
  EXPECT_EQ(CheckedAdd(kMax - 1, 1), kMax);
  EXPECT_FALSE(CheckedAdd(kMax, 1));
  EXPECT_EQ(CheckedMul(1ULL << 32, (1ULL << 32) - 1), kMax - (1ULL << 32) + 1);
  EXPECT_FALSE(CheckedMul(1ULL << 32, 1ULL << 32));
  EXPECT_TRUE(RangeFits(10, 0, 10));
  EXPECT_FALSE(RangeFits(11, 0, 10));
  EXPECT_FALSE(RangeFits(1, kMax, 10));
}

TEST(Crc32c, KnownVectors) {
  EXPECT_EQ(Crc32c("", 0), 0U);
  EXPECT_EQ(Crc32c("123456789", 9), 0xE3069283U);
  EXPECT_EQ(Crc32c("6789", 4, Crc32c("12345", 5)), 0xE3069283U);
  const std::vector<uint8_t> zeros(32);
  EXPECT_EQ(Crc32c(zeros.data(), zeros.size()), 0x8A9136AAU);
}

// ---- socket I/O ----

struct SocketPair {
  Fd a;
  Fd b;
  SocketPair() {
    int ends[2];
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    a = Fd(ends[0]);
    b = Fd(ends[1]);
  }
};

TEST(SocketIo, MovesMoreThanTheBufferAndMoreIovecsThanOneCallTakes) {
  const SocketPair pair;
  std::vector<uint32_t> sent(1 << 20);
  std::iota(sent.begin(), sent.end(), 0);
  std::vector<uint32_t> received(sent.size());
  const auto cut = [](std::vector<uint32_t> &words, size_t piece) {
    std::vector<iovec> list;
    for (size_t i = 0; i < words.size(); i += piece) {
      list.push_back({&words[i], std::min(piece, words.size() - i) * sizeof(uint32_t)});
      list.push_back({nullptr, 0});
    }
    return list;
  };
  std::thread sender([&] {
    auto list = cut(sent, 100);
    EXPECT_TRUE(SendVec(pair.a.get(), list.data(), list.size(), Soon()).ok());
  });
  auto list = cut(received, 77);
  EXPECT_TRUE(RecvVec(pair.b.get(), list.data(), list.size(), Soon()).ok());
  sender.join();
  EXPECT_EQ(received, sent);
}

TEST(SocketIo, DeadlinesHold) {
  const SocketPair pair;
  char byte = 0;
  const auto begin = Deadline::Clock::now();
  EXPECT_EQ(RecvAll(pair.a.get(), &byte, 1, Deadline::In(milliseconds(50))).code(), LLM_TIMEOUT);
  EXPECT_EQ(WaitReadable(pair.a.get(), Deadline::In(milliseconds(50))).code(), LLM_TIMEOUT);
  const std::vector<char> much(8 << 20);
  EXPECT_EQ(SendAll(pair.a.get(), much.data(), much.size(), Deadline::In(milliseconds(50))).code(), LLM_TIMEOUT);
  const auto took = Deadline::Clock::now() - begin;
  EXPECT_GE(took, milliseconds(150));
  EXPECT_LT(took, seconds(30));
}

// Bytes that keep trickling in must not stretch the deadline.
TEST(SocketIo, TricklingPeerIsCutAtTheDeadline) {
  const SocketPair pair;
  std::atomic<bool> stop{false};
  std::thread trickle([&] {
    const char byte = 1;
    while (!stop.load() && ::send(pair.a.get(), &byte, 1, MSG_NOSIGNAL | MSG_DONTWAIT) != 0) {
      std::this_thread::yield();
    }
  });
  std::vector<char> much(64 << 20);
  EXPECT_EQ(RecvAll(pair.b.get(), much.data(), much.size(), Deadline::In(milliseconds(100))).code(), LLM_TIMEOUT);
  stop = true;
  trickle.join();
}

TEST(SocketIo, EndOfThePeerIsAFailureNotASignal) {
  SocketPair pair;
  pair.a.Reset();
  char byte = 0;
  EXPECT_EQ(RecvAll(pair.b.get(), &byte, 1, Soon()).code(), LLM_FAILED);
  EXPECT_EQ(SendAll(pair.b.get(), &byte, 1, Soon()).code(), LLM_FAILED);
  EXPECT_TRUE(WaitReadable(pair.b.get(), Soon()).ok()) << "the end shows in the next receive";
}

TEST(SocketIo, ShutdownWakesAWaiter) {
  const SocketPair pair;
  std::thread waiter([&] {
    char byte = 0;
    EXPECT_TRUE(WaitReadable(pair.a.get(), Soon()).ok());
    EXPECT_EQ(RecvAll(pair.a.get(), &byte, 1, Soon()).code(), LLM_FAILED);
  });
  ::shutdown(pair.a.get(), SHUT_RDWR);
  waiter.join();
}

// ---- worker pool ----

TEST(WorkerPool, RunsEachPartOnce) {
  for (const size_t width : {0U, 1U, 2U, 5U}) {
    WorkerPool pool(width);
    for (const size_t count : {0U, 1U, 2U, 3U, 64U}) {
      std::vector<std::atomic<int>> runs(count);
      pool.Run(count, [&](size_t part) { ++runs[part]; });
      for (const auto &run : runs) {
        EXPECT_EQ(run.load(), 1);
      }
    }
  }
}

TEST(WorkerPool, UsesItsThreads) {
  WorkerPool pool(3);
  std::mutex mutex;
  std::condition_variable met;
  std::set<std::thread::id> threads;
  pool.Run(3, [&](size_t) {  // ends only if three threads are in it at once
    std::unique_lock<std::mutex> lock(mutex);
    threads.insert(std::this_thread::get_id());
    met.notify_all();
    EXPECT_TRUE(met.wait_for(lock, seconds(30), [&] { return threads.size() == 3; }));
  });
  EXPECT_EQ(threads.size(), 3U);
}

// A caller whose parts no pool thread can take must run them itself: here the only pool thread waits for that caller.
TEST(WorkerPool, CallersDoNotWaitForOneAnothersParts) {
  WorkerPool pool(2);
  std::mutex mutex;
  std::condition_variable changed;
  int blocked = 0;
  bool release = false;
  std::thread first([&] {
    pool.Run(2, [&](size_t) {
      std::unique_lock<std::mutex> lock(mutex);
      ++blocked;
      changed.notify_all();
      EXPECT_TRUE(changed.wait_for(lock, seconds(30), [&] { return release; }));
    });
  });
  {
    std::unique_lock<std::mutex> lock(mutex);
    ASSERT_TRUE(changed.wait_for(lock, seconds(30), [&] { return blocked == 2; }));
  }
  std::atomic<int> runs{0};
  pool.Run(8, [&](size_t) { ++runs; });
  EXPECT_EQ(runs.load(), 8);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    release = true;
  }
  changed.notify_all();
  first.join();
}

TEST(WorkerPool, ManyCallersAtOnce) {
  WorkerPool pool(3);
  std::atomic<uint64_t> sum{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int i = 0; i < 500; ++i) {
        pool.Run(5, [&](size_t part) { sum += part; });
      }
    });
  }
  for (std::thread &caller : callers) {
    caller.join();
  }
  EXPECT_EQ(sum.load(), 4U * 500U * 10U);
}

// ---- texts ----

TEST(OneLine, LeavesAPlainTextAlone) {
  EXPECT_EQ(OneLine(""), "");
  EXPECT_EQ(OneLine("cluster 7: 'name', allowed: 1..8"), "cluster 7: 'name', allowed: 1..8");
  EXPECT_EQ(OneLine("caf\xC3\xA9 \xE6\x96\x87 \xF0\x9F\x98\x80"), "caf\xC3\xA9 \xE6\x96\x87 \xF0\x9F\x98\x80");
}

TEST(OneLine, HasNoControlCharacters) {
  EXPECT_EQ(OneLine("a\nERROR b\r\tc\x1B[2J\x7F"), "a ERROR b  c [2J ");
  EXPECT_EQ(OneLine(std::string("a\0b", 3)), "a b");
  EXPECT_EQ(OneLine("a\xC2\x85" "b\xE2\x80\xA8" "c\xE2\x80\xAE" "d"), "a b c d");
}

TEST(OneLine, ReplacesWhatIsNoUtf8) {
  EXPECT_EQ(OneLine("\xFF"), "?");
  EXPECT_EQ(OneLine("a\x80z"), "a?z");
  EXPECT_EQ(OneLine("\xC3"), "?");              // cut
  EXPECT_EQ(OneLine("\xC0\xAF"), "??");         // overlong
  EXPECT_EQ(OneLine("\xED\xA0\x80"), "???");    // surrogate
  EXPECT_EQ(OneLine("\xF4\x90\x80\x80"), "????");  // beyond Unicode
  EXPECT_EQ(OneLine("\xE2\x82z"), "??z");
}

TEST(OneLine, IsCutBetweenCharacters) {
  std::string text(kMaxShownText, 'x');
  EXPECT_EQ(OneLine(text), text);
  text += "y";
  EXPECT_EQ(OneLine(text), std::string(kMaxShownText - 3, 'x') + "...");
  std::string wide = "x";
  while (wide.size() <= kMaxShownText) {
    wide += "\xE6\x96\x87";
  }
  const std::string cut = OneLine(wide);
  EXPECT_LE(cut.size(), kMaxShownText);
  EXPECT_EQ(OneLine(cut), cut);
  EXPECT_EQ(cut.substr(cut.size() - 3), "...");
}

TEST(Status, IsOneLineWhoeverWroteIt) {
  EXPECT_EQ(Status(llm_datadist::LLM_FAILED, "peer says: \xFF\nforged line").text(), "peer says: ? forged line");
  EXPECT_EQ(Invalid("\xC3(").text(), "?(");
}

}  // namespace
}  // namespace datadist
