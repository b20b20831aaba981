// What the provider "cann" makes of CANN's library, as the stand-in is it: what the library demands, and what it does
// not tell.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/fd.h"
#include "control/address.h"
#include "provider/cann/call_gate.h"
#include "provider/cann/device.h"
#include "provider/cann/status.h"
#include "support/eventually.h"
#include "support/provider_node.h"
#include "support/standin.h"

namespace datadist::testing {
namespace {

using namespace llm_datadist;  // the codes, which every line here names
using datadist::Status;
using std::chrono::milliseconds;
using std::chrono::steady_clock;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::Each;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

constexpr uint64_t kA = 1;
constexpr uint64_t kB = 2;
constexpr Shape kShape{4, 16, 64};
constexpr uint8_t kRubbish = 0x5A;

// What the stand-in is told applies to the endpoints that are made after it.
class CannProvider : public ::testing::Test {
 protected:
  void SetUp() override {
    UseStandIn();
    Rule("STRICT", "1");
  }
  void TearDown() override {
    for (const std::string &name : rules_) {
      ::unsetenv(name.c_str());
    }
    if (!trace_.empty()) {
      ::unlink(trace_.c_str());
    }
  }

  void Rule(const std::string &name, const std::string &value) {
    rules_.push_back("CANN_STANDIN_" + name);
    ::setenv(rules_.back().c_str(), value.c_str(), 1);
  }
  void TraceCalls() {
    trace_ = ::testing::TempDir() + "cann_provider_test." + std::to_string(::getpid());
    Rule("TRACE", trace_);
  }
  std::vector<std::string> Calls() const {
    std::vector<std::string> lines;
    std::ifstream file(trace_);
    for (std::string line; std::getline(file, line);) {
      lines.push_back(line);
    }
    return lines;
  }

 private:
  std::vector<std::string> rules_;
  std::string trace_;
};

void Start(ProviderNode &node, const TextOptions &options) {
  const Status status = node.provider().Initialize(options);
  ASSERT_TRUE(status.ok()) << status.text();
}

// ---- Initialize ----

TEST_F(CannProvider, OptionsOfOurEngineStayHere) {
  TraceCalls();
  ProviderNode node("cann", kA);
  Start(node, ServerOptions({{OPTION_TRANSPORT, "tcp"}, {OPTION_MAX_LINKS, "3"}, {OPTION_LOCAL_COMM_RES, "{}"}}));
  EXPECT_FALSE(node.provider().capabilities().engine_options);
  EXPECT_THAT(Calls(), Contains(AllOf(HasSubstr(" Initialize "), HasSubstr("llm.LocalCommRes={}"),
                                      HasSubstr("llm.DeviceId=0"))));
  EXPECT_THAT(Calls(), Each(Not(HasSubstr("datadist."))));
}

TEST_F(CannProvider, TheDeviceIsThatOfTheThreadUnlessItIsNamed) {
  TraceCalls();
  std::thread([] {
    ProviderNode stranger("cann", kA);
    const Status status = stranger.provider().Initialize({});
    EXPECT_EQ(status.code(), LLM_FAILED);
    EXPECT_THAT(status.text(), HasSubstr("this thread has no device"));
  }).join();
  std::thread([] {
    EXPECT_TRUE(cann::Device::Load().value().Enter(3).ok());
    ProviderNode node("cann", kA);
    Start(node, {});
  }).join();
  EXPECT_THAT(Calls(), Contains(HasSubstr("llm.DeviceId=3")));
  ProviderNode node("cann", kA);
  const Status none = node.provider().Initialize({{OPTION_DEVICE_ID, "8"}});
  EXPECT_EQ(none.code(), LLM_FAILED);
  EXPECT_THAT(none.text(), AllOf(HasSubstr("aclrtSetDevice(8)"), HasSubstr("ASCEND_RT_VISIBLE_DEVICES")));
  EXPECT_EQ(node.provider().Initialize({{OPTION_DEVICE_ID, "-1"}}).code(), LLM_PARAM_INVALID);
}

TEST_F(CannProvider, ListensOnIpv4Only) {
  ProviderNode node("cann", kA);
  const Status status = node.provider().Initialize(ClientOptions({{OPTION_LISTEN_IP_INFO, "[::1]:0"}}));
  EXPECT_EQ(status.code(), LLM_PARAM_INVALID);
  EXPECT_THAT(status.text(), AllOf(StartsWith("Initialize: "), HasSubstr("[::1]:0"), HasSubstr("IPv4")));
  Start(node, ClientOptions());
  ClusterInfo cluster = Cluster(kB, 1);
  cluster.remote_ip_infos[0].ip = "::1";
  std::vector<llm_datadist::Status> rets;
  const Status linked = node.provider().Link({cluster}, rets, 1000);
  EXPECT_EQ(linked.code(), LLM_PARAM_INVALID);
  EXPECT_THAT(linked.text(), AllOf(HasSubstr("cluster 2"), HasSubstr("::1"), HasSubstr("IPv4")));
}

// Between the look and the library's listener somebody may be faster.
TEST_F(CannProvider, APortThatWasTakenMeanwhileIsNotTheLast) {
  TraceCalls();
  Rule("STEAL_PORTS", "3");
  ProviderNode node("cann", kA);
  Start(node, ServerOptions());
  const std::vector<std::string> calls = Calls();
  EXPECT_EQ(std::count_if(calls.begin(), calls.end(),
                          [](const std::string &call) { return call.find(" Initialize ") != std::string::npos; }),
            4);
  EXPECT_THAT(calls, Contains(AllOf(HasSubstr(":" + std::to_string(node.port())), HasSubstr("-> 0x00000000"))));
}

TEST_F(CannProvider, AFailureThatIsNotThePortsIsToldAtOnce) {
  TraceCalls();
  ProviderNode node("cann", kA);
  EXPECT_EQ(node.provider().Initialize(ServerOptions({{OPTION_TRANSFER_BACKEND, "x"}})).code(), LLM_PARAM_INVALID);
  const auto is_initialize = [](const std::string &line) { return line.find(" Initialize ") != std::string::npos; };
  const std::vector<std::string> calls = Calls();  // the loader's probe may be among them
  EXPECT_EQ(std::count_if(calls.begin(), calls.end(), is_initialize), 1) << ::testing::PrintToString(calls);
}

// ---- threads ----

TEST_F(CannProvider, AThreadEntersBeforeItCalls) {
  ProviderNode node("cann", kA);
  EXPECT_EQ(node.provider().EnterThread().code(), LLM_FAILED) << "there is no device yet";
  Start(node, ClientOptions());
  std::thread([&] {
    EXPECT_EQ(node.AddCache(kShape, 1), 0);
    EXPECT_TRUE(node.provider().EnterThread().ok());
    EXPECT_NE(node.AddCache(kShape, 1), 0);
  }).join();
}

TEST_F(CannProvider, AChildOfForkCallsNothing) {
  ProviderNode node("cann", kA);
  Start(node, ClientOptions());
  EXPECT_EQ(InChild([&] {
              node.provider().Finalize();
              return node.provider().UnregisterKvCache(0).text() + "; " +
                     node.provider().Initialize(ClientOptions()).text();
            }),
            "UnregisterKvCache: not initialized; Initialize: made in another process: not usable after fork()");
  EXPECT_TRUE(node.provider().UnregisterKvCache(0).ok());
}

TEST(CannCallGate, ClosesWhenTheLastCallHasEnded) {
  cann::CallGate gate;
  EXPECT_FALSE(cann::CallGate::Pass(gate)) << "not open yet";
  gate.Open();
  auto running = std::make_unique<cann::CallGate::Pass>(gate);
  EXPECT_TRUE(*running);
  EXPECT_FALSE(gate.Close(milliseconds(1))) << "a call still runs";
  EXPECT_FALSE(cann::CallGate::Pass(gate));
  std::thread caller([&] { running.reset(); });
  EXPECT_TRUE(gate.Close(kPatience));
  caller.join();
}

// It may still write, and into the endpoint itself: neither is finalized, nor freed.
TEST_F(CannProvider, ACallThatNeverReturnsIsLeftAlone) {
  TraceCalls();
  Rule("HANG", "1");
  const std::string told = InChild([&] {
    std::string text;
    {
      ProviderNode node("cann", kA);
      Start(node, ClientOptions({{OPTION_SYNC_CACHE_WAIT_TIME, "100"}}));
      Provider &provider = node.provider();
      const int64_t cache = node.AddCache(kShape, 1);
      std::thread([&] {
        [[maybe_unused]] const Status entered = provider.EnterThread();
        [[maybe_unused]] const Status never = node.Pull(kB, 1, cache, {1}, {1});
      }).detach();
      EXPECT_TRUE(Eventually([&] { return ::testing::Value(Calls(), Contains(HasSubstr(" PullKvBlocks hangs "))); }));
      const auto began = steady_clock::now();
      provider.Finalize();
      text = steady_clock::now() - began < std::chrono::seconds(20) ? "in time; " : "late; ";
      text += provider.Initialize(ClientOptions()).text() + "; " + provider.UnregisterKvCache(cache).text();
    }
    return text;
  });
  EXPECT_EQ(told, "in time; Initialize: a call of before Finalize still runs; UnregisterKvCache: not initialized");
  EXPECT_THAT(Calls().back(), HasSubstr(" PullKvBlocks hangs ")) << "the library is called no more";
}

// ---- links ----

class TwoCannProviders : public CannProvider {
 protected:
  void Make() {
    a_ = std::make_unique<ProviderNode>("cann", kA);
    b_ = std::make_unique<ProviderNode>("cann", kB);
    Start(*b_, ServerOptions({{OPTION_SYNC_CACHE_WAIT_TIME, "5000"}}));
    Start(*a_, ClientOptions({{OPTION_SYNC_CACHE_WAIT_TIME, "5000"}}));
    mine_ = a_->AddCache(kShape, 1);
    theirs_ = b_->AddCache(kShape, 2);
    const Status linked = a_->Link(*b_);
    ASSERT_TRUE(linked.ok()) << linked.text();
  }
  std::unique_ptr<ProviderNode> a_;
  std::unique_ptr<ProviderNode> b_;
  int64_t mine_ = 0;
  int64_t theirs_ = 0;
};

TEST_F(TwoCannProviders, LinksAreNotReported) {
  Make();
  EXPECT_FALSE(a_->provider().capabilities().reports_links);
  EXPECT_EQ(a_->provider().QueryLink(kB).status().code(), LLM_FEATURE_NOT_ENABLED);
  EXPECT_EQ(a_->provider().WaitForHugePages().status().code(), LLM_FEATURE_NOT_ENABLED);
}

TEST_F(TwoCannProviders, LinksAreLimited) {
  Rule("MAX_LINKS", "1");
  Make();
  ProviderNode third("cann", 3);
  Start(third, ClientOptions());
  const Status full = third.Link(*b_);
  EXPECT_EQ(full.code(), LLM_LINK_FAILED);
  EXPECT_THAT(full.text(), AllOf(HasSubstr("cluster 2"), HasSubstr("512")));
  ASSERT_TRUE(a_->Unlink(*b_, false).ok());
  EXPECT_TRUE(third.Link(*b_).ok());
}

// Whoever died, or unlinked by force, told nobody.
TEST_F(TwoCannProviders, HalfALinkCountsUntilItIsUnlinkedHere) {
  Rule("MAX_LINKS", "1");
  Make();
  EXPECT_FALSE(b_->provider().capabilities().peer_drops_half);
  ASSERT_TRUE(a_->Unlink(*b_, true).ok());
  ProviderNode third("cann", 3);
  Start(third, ClientOptions());
  EXPECT_EQ(third.Link(*b_).code(), LLM_LINK_FAILED);
  EXPECT_TRUE(a_->Link(*b_).ok()) << "its own place";
  a_->provider().Finalize();
  EXPECT_EQ(third.Link(*b_).code(), LLM_LINK_FAILED);
  std::vector<llm_datadist::Status> rets;
  ASSERT_TRUE(b_->provider().Unlink({Cluster(kA, 0)}, rets, 1000, true).ok());
  EXPECT_TRUE(third.Link(*b_).ok());
}

// Our engine would say LLM_PROCESSING_LINK; CANN's library waits for an answer that does not come.
TEST_F(CannProvider, CrossingLinksEndWithTheirTimeOut) {
  ProviderNode node("cann", kA);
  Start(node, ClientOptions());
  EXPECT_FALSE(node.provider().capabilities().crossing_links);
  auto silent = Listen(SocketAddress::FromIp(kLoopback, 0).value());
  ASSERT_TRUE(silent.ok());
  const uint16_t port = SocketAddress::LocalOf(silent.value().tcp.get()).port();
  const auto link = [&](int32_t timeout_ms) {
    std::vector<llm_datadist::Status> rets;
    EXPECT_TRUE(node.provider().EnterThread().ok());
    return node.provider().Link({Cluster(kB, port)}, rets, timeout_ms);
  };
  std::thread first([&] { EXPECT_FALSE(link(20000).ok()); });
  Fd dialled;
  ASSERT_TRUE(Eventually([&] {
    for (const int listener : {silent.value().local.get(), silent.value().tcp.get()}) {
      dialled = dialled ? std::move(dialled) : Fd(::accept(listener, nullptr, nullptr));
    }
    return static_cast<bool>(dialled);
  }));
  const auto began = steady_clock::now();
  const Status second = link(300);
  EXPECT_EQ(second.code(), LLM_TIMEOUT);
  EXPECT_GE(steady_clock::now() - began, milliseconds(300));
  EXPECT_THAT(second.text(), HasSubstr("may be linking to this end"));
  dialled.Reset();
  first.join();
}

// ---- memory ----

TEST_F(CannProvider, RegionsAreLimited) {
  Rule("MAX_REGIONS", "10");
  ProviderNode node("cann", kA);
  Start(node, ClientOptions());
  EXPECT_NE(node.AddCache({8, 4, 64}, 1), 0);
  Bytes memory(3 * 256);
  const auto start = reinterpret_cast<uint64_t>(memory.data());
  const CacheDesc desc{CachePlacement::kDevice, 3, DT_INT8, {4, 64}, {}};
  const Status full = node.provider().RegisterKvCache(desc, {start, start + 256, start + 512}).status();
  EXPECT_EQ(full.code(), LLM_FAILED);
  EXPECT_THAT(full.text(), AllOf(StartsWith("RegisterKvCache: 3 addresses beside the 8"), HasSubstr("256")));
  EXPECT_TRUE(node.provider().RegisterKvCache(desc, {start, start + 256, start}).ok()) << "ten regions";
  EXPECT_TRUE(node.provider().RegisterKvCache(desc, {start, start, start + 256}).ok()) << "and no more for a view";
}

// The call has failed, and what it had asked for is written all the same: until the unlink has ended, and not after it.
TEST_F(TwoCannProviders, AFailedPullWritesUntilItsLinkIsUnlinked) {
  Rule("LATE_EVERY", "2");
  Rule("LATE_MS", "300");
  Make();
  EXPECT_FALSE(a_->provider().capabilities().writes_end_with_call);
  ASSERT_TRUE(a_->Pull(kB, theirs_, mine_, {1}, {1}).ok());
  Bytes expected = a_->Contents(mine_);
  const Status late = a_->Pull(kB, theirs_, mine_, {2}, {3});
  EXPECT_EQ(late.code(), LLM_TIMEOUT);
  EXPECT_THAT(late.text(), HasSubstr("until it is unlinked by force"));
  EXPECT_EQ(a_->Pull(kB, theirs_, mine_, {4}, {4}).code(), LLM_TIMEOUT) << "the link is of no use any more";

  ASSERT_TRUE(a_->Unlink(*b_, true).ok());
  for (size_t tensor = 0; tensor < kShape.tensors; ++tensor) {
    const auto at = static_cast<std::ptrdiff_t>(tensor * 16 + 3) * kShape.stride;
    std::fill_n(expected.begin() + at, kShape.stride, kRubbish);
  }
  EXPECT_EQ(a_->Contents(mine_), expected) << "all of it, and it is over";
  ASSERT_TRUE(a_->Link(*b_).ok());
  EXPECT_TRUE(a_->Pull(kB, theirs_, mine_, {2}, {3}).ok());
}

// ---- what the codes mean ----

TEST(CannStatus, EveryCodeSaysWhatToDo) {
  using cann::CallKind;
  const auto text = [](CallKind kind, cann::Code code) {
    return cann::Explain(kind, code, "cluster 7").text();
  };
  EXPECT_TRUE(cann::Explain(CallKind::kLink, LLM_SUCCESS).ok());
  EXPECT_THAT(text(CallKind::kTransfer, LLM_TIMEOUT),
              AllOf(StartsWith("cluster 7: CANN answered LLM_TIMEOUT (0x5010B01A): "),
                    HasSubstr("HCCL_RDMA_TIMEOUT")));
  EXPECT_THAT(text(CallKind::kLink, LLM_TIMEOUT), HasSubstr("HCCL_CONNECT_TIMEOUT"));
  EXPECT_THAT(text(CallKind::kLink, LLM_LINK_FAILED), AllOf(HasSubstr("hccn_tool"), HasSubstr("/etc/hccn.conf")));
  EXPECT_THAT(text(CallKind::kLink, LLM_PARAM_INVALID), HasSubstr("physical"));
  EXPECT_THAT(text(CallKind::kOther, LLM_FEATURE_NOT_ENABLED), HasSubstr("V1"));
  EXPECT_THAT(text(CallKind::kTransfer, 507057), HasSubstr("ACL_ERROR_RT_SUSPECT_REMOTE_ERROR"));
  EXPECT_THAT(text(CallKind::kTransfer, LLM_FAILED), HasSubstr("CANN's log"));
  EXPECT_EQ(cann::Explain(CallKind::kTransfer, 507053).code(), 507053U) << "codes stay as they are";
}

}  // namespace
}  // namespace datadist::testing
