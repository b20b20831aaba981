// Whose memory it is, the kernel says: the probe, what follows the bytes of every pull, the kernel's errors in words.
#include <gtest/gtest.h>
#include <linux/sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>

#include "control/address.h"
#include "transport/cma/process_memory.h"
#include "transport_support/initiator.h"
#include "transport_support/owner_process.h"

namespace datadist::test {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_KV_CACHE_NOT_EXIST;
using llm_datadist::LLM_LINK_FAILED;
using testing::Test;

Deadline Soon() { return Deadline::In(std::chrono::seconds(30)); }

bool Contains(const Status &status, const std::string &text) { return status.text().find(text) != std::string::npos; }

// ---- probe ----

TEST(ProbeCma, AcceptsAProcessOfOurUser) {
  OwnerProcess owner;
  const Status status = ProbeCma(*owner.Process());
  EXPECT_TRUE(status.ok()) << status.text();
  EXPECT_TRUE(ProbeCma(*PeerProcess::Self()).ok());
}

TEST(ProbeCma, SaysWhyNot) {
  OwnerProcess owner;
  const auto process = owner.Process();
  owner.Kill();
  const Status status = ProbeCma(*process);
  EXPECT_EQ(status.code(), LLM_LINK_FAILED);
  EXPECT_TRUE(Contains(status, "is gone")) << status.text();
}

// ---- identity ----

TEST(PeerProcess, IsWhoTheKernelSaysAndNotAlivePastItsEnd) {
  OwnerProcess owner;
  const auto process = owner.Process();
  EXPECT_TRUE(process->Alive());
  EXPECT_FALSE(process->IsSelf());
  owner.Kill();
  EXPECT_FALSE(process->Alive());
}

// A process of another user is nobody. Only root can become one to show it.
TEST(PeerProcess, OfAnotherUserIsRefused) {
  if (::geteuid() != 0) {
    GTEST_SKIP() << "needs root, to become another user";
  }
  const Listeners listeners = Listen(SocketAddress::FromIp("127.0.0.1", 0).value()).value();
  const SocketAddress address = SocketAddress::LocalOf(listeners.tcp.get());
  const pid_t child = ::fork();
  if (child == 0) {
    constexpr uid_t kNobody = 65534;
    if (::setuid(kNobody) != 0) {
      ::_exit(2);
    }
    // The dialling side sees that the listener is of another user and goes by TCP; a hostile one would connect all the
    // same, as the kernel's name is open to all.
    const Result<Connection> dialled = Dial(address, Soon());
    ::_exit(dialled.ok() && dialled.value().process == nullptr ? 0 : 1);
  }
  Fd accepted;
  while (!accepted) {
    accepted = Fd(::accept(listeners.local.get(), nullptr, nullptr));
  }
  const auto identified = Identify(std::move(accepted));
  EXPECT_FALSE(identified.ok());
  EXPECT_TRUE(Contains(identified.status(), "of user 65534")) << identified.status().text();
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

// ---- generation and process ----

void PutAddress(Blob &blob, size_t place, uint64_t address) {
  Writer writer;
  writer.U64(address);
  std::copy_n(writer.data(), writer.size(), blob.begin() + static_cast<std::ptrdiff_t>(writer.size() * place));
}

class Cma : public Test {
 protected:
  TransferOp Op(const RemoteCache &remote) { return {&remote, &local_.pin(), 0, 0, 2, {{0, 0, 4 * 64}}}; }
  std::unique_ptr<DataPath> Path() { return MakeCmaDataPath(owner_->Process(), &calls_, pool_); }

  const CacheShape shape_{2, 4, 64};
  OwnerProcess *process_ = new OwnerProcess;
  std::unique_ptr<Owner> owner_{process_};
  CallsTo calls_{owner_};
  std::shared_ptr<WorkerPool> pool_ = std::make_shared<WorkerPool>(1);
  RemoteCache remote_ = owner_->AddCache(shape_, 1);
  LocalCache local_{shape_, 2};
};

// A child with the pid that we ask for; -1 where the kernel or its administrator does not let us.
pid_t ForkAs(pid_t pid) {
  clone_args arguments{};
  arguments.exit_signal = SIGCHLD;
  arguments.set_tid = static_cast<__u64>(reinterpret_cast<uintptr_t>(&pid));
  arguments.set_tid_size = 1;
  return static_cast<pid_t>(::syscall(SYS_clone3, &arguments, sizeof(arguments)));
}

// The pid has become another process's, with readable memory and the right generation at the same addresses: a copy of
// ours. What is read from it counts for nothing.
TEST(PeerProcess, IsNotAnotherUnderTheSamePid) {
  const CacheShape shape{2, 4, 64};
  LocalCache ours(shape, 1);
  LocalCache into(shape, 2);
  const RemoteCache remote = Told(ours.pin().cache());
  const pid_t first = ::fork();
  if (first == 0) {
    ::pause();
    ::_exit(0);
  }
  const auto process = PeerProcess::OfChild(first).value();
  const auto path = MakeCmaDataPath(process, nullptr, std::make_shared<WorkerPool>(1));
  const TransferOp op{&remote, &into.pin(), 0, 0, 2, {{0, 0, 4 * 64}}};
  EXPECT_TRUE(path->Pull(op, Soon()).ok());
  ::kill(first, SIGKILL);
  ASSERT_EQ(::waitpid(first, nullptr, 0), first);
  const pid_t second = ForkAs(first);
  if (second == 0) {
    ::pause();
    ::_exit(0);
  }
  if (second < 0) {
    GTEST_SKIP() << "a child cannot be given a pid here";
  }
  ASSERT_EQ(second, first);
  const Status status = path->Pull(op, Soon());
  ::kill(second, SIGKILL);
  ::waitpid(second, nullptr, 0);
  EXPECT_EQ(status.code(), LLM_FAILED);
  EXPECT_TRUE(Contains(status, "is gone")) << status.text();
}

TEST_F(Cma, AProcessThatIsGoneIsNotTakenForAnother) {
  const auto path = Path();
  ASSERT_TRUE(path->Pull(Op(remote_), Soon()).ok());
  process_->Kill();
  const Status status = path->Pull(Op(remote_), Soon());
  EXPECT_EQ(status.code(), LLM_FAILED);
  EXPECT_TRUE(Contains(status, "is gone")) << status.text();
}

TEST_F(Cma, StampOfAnotherGenerationIsAMissingCache) {
  RemoteCache stale = remote_;
  const Blob other = owner_->AddCache(shape_, 4).blob;
  std::copy_n(other.begin(), 8, stale.blob.begin());  // another cache's stamp: alive, but not ours
  EXPECT_EQ(Path()->Pull(Op(stale), Soon()).code(), LLM_KV_CACHE_NOT_EXIST);
}

TEST(Generations, OfTwoTablesDiffer) {
  LocalCache one({1, 1, 64}, 1);
  LocalCache other({1, 1, 64}, 1);
  EXPECT_NE(one.pin().cache().generation(), other.pin().cache().generation());
}

TEST_F(Cma, UnmappedMemoryIsAFailureInWords) {
  RemoteCache wild = remote_;
  for (const size_t tensor : {0, 1}) {
    PutAddress(wild.blob, 1 + tensor, 4096);
  }
  const Status status = Path()->Pull(Op(wild), Soon());
  EXPECT_EQ(status.code(), LLM_FAILED);
  EXPECT_TRUE(Contains(status, "not mapped")) << status.text();
}

// A blob is as long as the geometry says, or nothing of it is read. None at all is how an owner says that we may not.
TEST_F(Cma, AddressesThatDoNotMatchTheGeometryAreRefused) {
  const size_t whole = remote_.blob.size();
  ASSERT_EQ(whole, 8 + 8 * shape_.num_tensors);
  RemoteCache untold = remote_;
  untold.blob.clear();
  EXPECT_EQ(Path()->Pull(Op(untold), Soon()).code(), llm_datadist::LLM_PARAM_INVALID);
  for (const size_t size : {size_t{7}, size_t{8}, whole - 8, whole - 1, whole + 1, whole + 8, kMaxCacheBlob}) {
    RemoteCache odd = remote_;
    odd.blob.resize(size, 0x5A);
    EXPECT_EQ(Path()->Pull(Op(odd), Soon()).code(), LLM_FAILED) << size;
  }
  RemoteCache more_tensors = remote_;
  more_tensors.geometry.num_tensors = 3;
  EXPECT_EQ(Path()->Pull(Op(more_tensors), Soon()).code(), LLM_FAILED);
  RemoteCache no_stamp = remote_;
  PutAddress(no_stamp.blob, 0, 0);
  EXPECT_EQ(Path()->Pull(Op(no_stamp), Soon()).code(), LLM_FAILED);
  EXPECT_TRUE(Path()->Pull(Op(remote_), Soon()).ok());
}

TEST_F(Cma, APushAsksTheOwnerAndNobodyElseWrites) {
  const auto path = Path();
  EXPECT_TRUE(path->Push(Op(remote_), Soon()).ok());
  EXPECT_EQ(owner_->Bytes(remote_.cache_id), PatternOf(shape_, 2));
  EXPECT_EQ(calls_.asked, 1);
  EXPECT_EQ(path->Push(Op(remote_), Deadline::In(std::chrono::milliseconds(0))).code(), llm_datadist::LLM_TIMEOUT);
  path->Close();
  EXPECT_EQ(path->Push(Op(remote_), Soon()).code(), LLM_FAILED);
  EXPECT_EQ(calls_.asked, 1) << "a push that cannot run asks nobody";
}

// ---- batches ----

// The kernel stops at an unmapped page after the bytes before it; the batch must say so and not spin.
TEST(IovecBatch, StopsAtAHoleInTheMiddle) {
  const size_t page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  auto *memory = static_cast<uint8_t *>(
      ::mmap(nullptr, 3 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  ASSERT_NE(memory, MAP_FAILED);
  memory[0] = 42;
  ASSERT_EQ(::munmap(memory + page, page), 0);
  std::vector<uint8_t> out(3 * page);
  IovecBatch batch;
  batch.Add(reinterpret_cast<uintptr_t>(memory), out.data(), 3 * page);
  EXPECT_EQ(batch.Read(::getpid()).code(), LLM_FAILED);
  EXPECT_EQ(out[0], 42);
  EXPECT_TRUE(batch.Empty());
  ::munmap(memory, page);
  ::munmap(memory + 2 * page, page);
}

TEST(IovecBatch, MergesEachSideByItself) {
  std::vector<uint8_t> from(1 << 16);
  std::vector<uint8_t> to(1 << 16);
  for (size_t i = 0; i < from.size(); ++i) {
    from[i] = static_cast<uint8_t>(i * 7);
  }
  IovecBatch batch;
  for (size_t i = 0; i < 4096; ++i) {  // far more pairs than one call takes, were they not merged
    ASSERT_FALSE(batch.Full());
    batch.Add(reinterpret_cast<uintptr_t>(&from[i * 16]), &to[i * 16], 16);
  }
  ASSERT_TRUE(batch.Read(::getpid()).ok());
  EXPECT_EQ(to, from);
}

}  // namespace
}  // namespace datadist::test

int main(int argc, char **argv) { return datadist::test::TestMain(argc, argv); }
