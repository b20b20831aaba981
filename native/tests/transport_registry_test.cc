// A further transport is a folder: one that control/ and link/ have never heard of links over real sockets, is chosen
// by what its two ends tell one another, and moves bytes. And what peers may say of transports.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <string>
#include <utility>

#include "support/frames.h"
#include "support/member.h"
#include "support/stranger.h"
#include "transport/pieces.h"
#include "transport_support/initiator.h"

namespace datadist::testing {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_LINK_FAILED;
using llm_datadist::LLM_SUCCESS;
using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr uint64_t kTensorBytes = Member::kShape.num_blocks * Member::kShape.stride;

Blob BlobOfText(const std::string &text) { return {text.begin(), text.end()}; }

// ---- a transport of this file's own: reads /proc/PID/mem, where it is told in words to look ----

constexpr char kProcmem[] = "procmem";

struct ProcmemLog {
  std::atomic<int> reads{0};
  std::atomic<int> knocks{0};  // of initiators on their data connections, as owners heard them
};

class ProcmemPath final : public DataPath {
 public:
  ProcmemPath(const Blob &offer, std::vector<Fd> connections, PeerCalls *calls, ProcmemLog &log)
      : memory_(::open(std::string(offer.begin(), offer.end()).c_str(), O_RDONLY | O_CLOEXEC)),
        connections_(std::move(connections)),
        calls_(calls),
        log_(log) {}

  Status Pull(const TransferOp &op, Deadline) override {
    if (const Result<uint64_t> total = CheckOp(op); !total.ok()) {
      return total.status();
    }
    for (const Fd &connection : connections_) {
      (void)::send(connection.get(), "!", 1, MSG_NOSIGNAL);
    }
    const std::string place(op.remote->blob.begin(), op.remote->blob.end());
    size_t used = 0;
    for (uint32_t tensor = 0; tensor < op.remote_first_tensor + op.tensor_count; ++tensor) {
      const size_t end = place.find(';', used);
      if (end == std::string::npos) {
        return Status(LLM_FAILED, "the owner did not say where tensor " + std::to_string(tensor) + " is");
      }
      const uint64_t address = std::stoull(place.substr(used, end - used));
      used = end + 1;
      if (tensor < op.remote_first_tensor) {
        continue;
      }
      for (const Run &run : op.runs) {
        void *const to = op.local->Resolve(op.local_first_tensor + tensor - op.remote_first_tensor, run.local_offset,
                                           run.length).value();
        if (::pread(memory_.get(), to, run.length, static_cast<off_t>(address + run.remote_offset)) !=
            static_cast<ssize_t>(run.length)) {
          return Status(LLM_FAILED, "cannot read there");
        }
      }
    }
    ++log_.reads;
    return Status::Ok();
  }
  Status Push(const TransferOp &op, Deadline deadline) override { return calls_->AskToRead(op, deadline); }
  void Close() override {}

 private:
  const Fd memory_;
  const std::vector<Fd> connections_;
  PeerCalls *const calls_;
  ProcmemLog &log_;
};

class ProcmemOwner final : public OwnerPath {
 public:
  ProcmemOwner(std::unique_ptr<DataPath> reading, std::vector<Fd> connections, ProcmemLog &log)
      : reading_(std::move(reading)), connections_(std::move(connections)), log_(log) {}
  DataPath *reading() override { return reading_.get(); }
  ~ProcmemOwner() override {
    char knock = 0;
    for (const Fd &connection : connections_) {
      while (::recv(connection.get(), &knock, 1, MSG_DONTWAIT) == 1) {
        ++log_.knocks;
      }
    }
  }

 private:
  const std::unique_ptr<DataPath> reading_;
  const std::vector<Fd> connections_;
  ProcmemLog &log_;
};

class Procmem final : public Transport {
 public:
  Procmem(ProcmemLog &log, std::string offer, bool tells) : log_(log), offer_(std::move(offer)), tells_(tells) {}

  Blob Offer() const override { return BlobOfText(offer_); }
  Status Reaches(const TransportPeer &peer) const override { return Admits(peer); }
  Status Admits(const TransportPeer &peer) const override {
    const std::string path(peer.offer.begin(), peer.offer.end());
    return ::access(path.c_str(), R_OK) == 0 ? Status::Ok() : Status(LLM_LINK_FAILED, "there is no '" + path + "'");
  }
  uint16_t Connections(const TransportPeer &) const override { return 2; }
  std::unique_ptr<DataPath> MakePath(const TransportPeer &peer, std::vector<Fd> connections,
                                     PeerCalls *calls) const override {
    return std::make_unique<ProcmemPath>(peer.offer, std::move(connections), calls, log_);
  }
  std::unique_ptr<OwnerPath> Serve(const TransportPeer &peer, std::vector<Fd> connections) const override {
    return std::make_unique<ProcmemOwner>(MakePath(peer, {}, nullptr), std::move(connections), log_);
  }

 private:
  Blob BlobOf(const RegisteredCache &cache) const override {
    std::string place;
    for (const uint64_t address : cache.addrs()) {
      place += std::to_string(address) + ";";
    }
    return BlobOfText(tells_ ? place : "");
  }

  ProcmemLog &log_;
  const std::string offer_;
  const bool tells_;
};

class AFurtherTransport : public ::testing::Test {
 protected:
  LinkOptions With(const std::string &offer = "/proc/" + std::to_string(::getpid()) + "/mem", bool tells = true) {
    LinkOptions options;
    options.transports.insert(options.transports.begin(), {kProcmem, [this, offer, tells](const TransportHost &) {
                                                              return std::make_unique<Procmem>(log_, offer, tells);
                                                            }});
    return options;
  }

  ProcmemLog log_;
};

TEST_F(AFurtherTransport, LinksAndMovesBytesBothWays) {
  {
    Member owner(2, With());
    Member peer(1, With());
    ASSERT_TRUE(peer.Dial(owner.Listen(), 2).ok());
    EXPECT_EQ(peer.table()->Find(2)->Report().transport, kProcmem);
    EXPECT_EQ(peer.table()->Find(2)->Report().transport_reason, "");
    const int64_t theirs = owner.AddCache(5);
    const int64_t ours = peer.AddCache(6);
    const Status pulled = peer.Pull(2, theirs, ours, 1, 4, 3);
    ASSERT_TRUE(pulled.ok()) << pulled.text();
    EXPECT_EQ(peer.Bytes(ours), Copied(5, 6, 1, 4, 3));
    EXPECT_EQ(log_.reads, 1);
    const int64_t more = owner.AddCache(7);
    const int64_t source = peer.AddCache(8);
    const Status pushed = peer.Push(2, source, more, 0, 6, 2);
    ASSERT_TRUE(pushed.ok()) << pushed.text();
    EXPECT_EQ(owner.Bytes(more), Copied(8, 7, 0, 6, 2));
    EXPECT_EQ(log_.reads, 2);
    ASSERT_TRUE(Eventually([&] { return owner.Linked(1); }));
    const Status back = owner.Pull(1, source, theirs, 0, 0, 8);
    ASSERT_TRUE(back.ok()) << back.text();
    EXPECT_EQ(owner.Bytes(theirs), test::PatternOf(Member::kShape, 8));
    EXPECT_TRUE(owner.CanariesIntact() && peer.CanariesIntact());
  }
  EXPECT_EQ(log_.knocks, 4) << "of one pull each way, on both connections";
}

TEST_F(AFurtherTransport, IsForPeersThatHaveItToo) {
  Member with(2, With());
  Member without(1);
  ASSERT_TRUE(without.Dial(with.Listen(), 2).ok());
  EXPECT_EQ(without.table()->Find(2)->Report().transport, "local");
  const auto report = with.table()->Find(1)->Report();
  EXPECT_EQ(report.transport, "local");
  EXPECT_EQ(report.transport_reason, "procmem: the peer does not offer it");
  LinkOptions forced = With();
  forced.forced_transport = kProcmem;
  Member stubborn(3, forced);
  const Status status = stubborn.Dial(without.Listen(), 1);
  EXPECT_EQ(status.code(), LLM_LINK_FAILED);
  EXPECT_THAT(status.text(), HasSubstr("transport procmem cannot reach the peer: the peer does not offer it"));
}

TEST_F(AFurtherTransport, AloneJudgesWhatThePeersSays) {
  Member wrong(2, With("/nowhere"));
  Member right(1, With());
  const Status status = right.Dial(wrong.Listen(), 2);
  // The one has read that it leads nowhere, and the other has chosen it for its own transfers.
  EXPECT_EQ(status.code(), LLM_LINK_FAILED);
  EXPECT_THAT(status.text(), HasSubstr("transport procmem there is no '/nowhere'"));
}

TEST_F(AFurtherTransport, AloneReadsWhatIsToldOfACache) {
  Member silent(2, With("/proc/self/mem", false));
  Member peer(1, With("/proc/self/mem"));
  ASSERT_TRUE(peer.Dial(silent.Listen(), 2).ok());
  const int64_t theirs = silent.AddCache(5);
  const int64_t ours = peer.AddCache(6);
  const Status status = peer.Pull(2, theirs, ours, 0, 0, 8);
  EXPECT_EQ(status.code(), LLM_FAILED);
  EXPECT_THAT(status.text(), HasSubstr("did not say where tensor 0 is"));
  EXPECT_EQ(peer.Bytes(ours), test::PatternOf(Member::kShape, 6));
}

// ---- what peers may say ----

class Saying : public ::testing::Test {
 protected:
  // Within the host, by the socket that the kernel vouches for.
  Stranger Caller() { return Stranger(std::move(Dial(address_, Soon()).value().fd)); }
  Status RefusalOf(Stranger &stranger, const std::vector<TransportOffer> &offers, const std::string &transport) {
    EndpointInfo info = InfoOf(1);
    info.transports = offers;
    if (stranger.Greet(info).type != MessageType::kWelcome) {
      return Status(LLM_FAILED, "not welcome");
    }
    stranger.Say(MessageType::kReady, Encode(Ready{transport, ""}), 2);
    const Frame answer = stranger.Hear(MessageType::kReady);
    return answer.type == MessageType::kReject ? Decode<Reject>(answer.body).value().status : Status::Ok();
  }

  static LinkOptions Patient() {
    LinkOptions options;
    options.heartbeat_interval = std::chrono::minutes(10);  // strangers do not answer
    return options;
  }

  Member victim_{2, Patient()};
  const SocketAddress address_ = victim_.Listen();
};

TEST_F(Saying, ATransportThatNobodyOffersIsRefusedInWords) {
  struct Case {
    std::vector<TransportOffer> offers;
    std::string transport;
    std::string said;
  };
  const std::vector<TransportOffer> all = OffersWith(1);
  std::vector<TransportOffer> more = all;
  more.push_back({"rdma", {1, 2, 3}});
  for (const Case &test : {Case{all, "rdma", "transport rdma is none that this end offers (local, cma, tcp)"},
                           Case{more, "rdma", "transport rdma is none that this end offers (local, cma, tcp)"},
                           Case{{{"cma", {}}}, "tcp", "transport tcp: the peer does not offer it"},
                           Case{{{"rdma", {}}}, "rdma", "no transport reaches the peer"},
                           Case{{}, "cma", "no transport reaches the peer"}}) {
    Stranger stranger = Caller();
    const Status status = RefusalOf(stranger, test.offers, test.transport);
    EXPECT_EQ(status.code(), LLM_LINK_FAILED) << test.said;
    EXPECT_THAT(status.text(), HasSubstr(test.said));
  }
  Stranger known = Caller();
  EXPECT_TRUE(RefusalOf(known, more, "cma").ok()) << "what it offers besides is its own business";
}

TEST_F(Saying, AnOfferOfTheWrongFormIsRefusedByItsTransport) {
  for (const Blob &offer : {Blob{}, Blob{1}, Blob{0, 0}, Blob{17, 0}, Blob{1, 1}, Blob{1, 0, 0}, Blob(kMaxOfferBlob, 1)}) {
    Stranger stranger = Caller();
    const Status status = RefusalOf(stranger, {{"cma", {}}, {"tcp", offer}}, "tcp");
    EXPECT_EQ(status.code(), LLM_LINK_FAILED) << offer.size();
    EXPECT_THAT(status.text(), HasSubstr("transport tcp needs 1 to 16 streams of the peer")) << offer.size();
  }
  for (const Blob &offer : {Blob{}, Blob(7, 1), Blob(9, 1), Blob(8, 0xFF)}) {  // no endpoint of this process
    Stranger stranger = Caller();
    EndpointInfo info = InfoOf(1);
    info.transports = {{"local", offer}, {"cma", {}}};
    stranger.Greet(info);
    stranger.Say(MessageType::kReady, Encode(Ready{"cma", ""}), 2);
    EXPECT_EQ(Decode<Ready>(stranger.Hear(MessageType::kReady).body).value().transport, "cma");
  }
}

TEST_F(Saying, AnOfferAboveTheLimitEndsTheConnection) {
  Stranger stranger = Caller();
  Hello hello;
  hello.versions = {kProtocolVersion, kProtocolVersion};
  hello.client = InfoOf(1);
  hello.client.transports = {{"tcp", Blob(kMaxOfferBlob + 1)}};
  stranger.Say(MessageType::kHello, Encode(hello));
  const Frame answer = stranger.Hear(MessageType::kReject);
  EXPECT_THAT(Decode<Reject>(answer.body).value().status.text(), HasSubstr("malformed HELLO"));
}

// Addresses that do not belong to the geometry: nothing is read by them, and nothing of ours is written.
TEST_F(Saying, ABlobOfACacheOfTheWrongLengthIsRefusedByItsTransport) {
  const int64_t cache = victim_.AddCache(5);
  const uint64_t generation = victim_.endpoint()->regions()->Pin(cache).value().cache().generation();
  const test::LocalCache source(Member::kShape, 6);
  Stranger stranger = Caller();
  ASSERT_TRUE(RefusalOf(stranger, {{"cma", {}}}, "cma").ok());
  stranger.Say(MessageType::kEstablished, {}, 3);
  stranger.Hear(MessageType::kEstablished);
  PushRequest push{cache, generation, 0, test::Told(source.pin().cache()), 0, Member::kShape.num_tensors, 20000,
                   {{0, 0, kTensorBytes}}};
  const Blob whole = push.source.blob;
  uint32_t seq = 3;
  const auto said = [&] {
    stranger.Say(MessageType::kPush, Encode(push), ++seq);
    return Decode<Pushed>(stranger.Hear(MessageType::kPushed).body).value().status;
  };
  for (const size_t size : {size_t{1}, size_t{8}, whole.size() - 1, whole.size() + 1, kMaxCacheBlob}) {
    push.source.blob = whole;
    push.source.blob.resize(size, 0x5A);
    const Status status = said();
    EXPECT_EQ(status.code(), LLM_FAILED) << size;
    EXPECT_THAT(status.text(), HasSubstr("did not tell the addresses")) << size;
    EXPECT_EQ(victim_.Bytes(cache), test::PatternOf(Member::kShape, 5)) << size;
  }
  push.source.blob = {};
  EXPECT_THAT(said().text(), HasSubstr("did not tell where it lies")) << "as one whose peers may not read";
  EXPECT_EQ(victim_.Bytes(cache), test::PatternOf(Member::kShape, 5));
  push.source.blob = whole;
  EXPECT_EQ(said().code(), LLM_SUCCESS);
  EXPECT_EQ(victim_.Bytes(cache), test::PatternOf(Member::kShape, 6));
  push.source.blob.resize(kMaxCacheBlob + 1);
  stranger.Say(MessageType::kPush, Encode(push), ++seq);
  EXPECT_TRUE(stranger.IsTurnedAway());
}

TEST_F(Saying, APushIsForTransportsThatAsk) {
  const int64_t cache = victim_.AddCache(5);
  Stranger stranger = Caller();
  ASSERT_TRUE(RefusalOf(stranger, OffersWith(1), "local").ok());
  stranger.Say(MessageType::kEstablished, {}, 3);
  stranger.Hear(MessageType::kEstablished);
  const test::LocalCache source(Member::kShape, 6);
  stranger.Say(MessageType::kPush, Encode(PushRequest{cache, 1, 0, test::Told(source.pin().cache()), 0, 1, 20000, {}}), 4);
  EXPECT_TRUE(stranger.IsTurnedAway());
}

}  // namespace
}  // namespace datadist::testing
