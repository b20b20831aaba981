#include "transport_support/owner_process.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "base/socket_io.h"

namespace datadist::test {
namespace {

constexpr char kOwnerFlag[] = "--owner";
constexpr int kChannelFd = 3;
constexpr size_t kMaxText = 512;

enum class Command : uint8_t {
  kAddCache,
  kUnregisterAndReuse,
  kBytes,
  kCanariesIntact,
  kListen,
  kServe,
  kRead,
};

// A whole test, sanitizers included, is far shorter: what waits so long is a hang.
Deadline Patience() { return Deadline::In(std::chrono::seconds(60)); }

Status SendMessage(int fd, const Writer &message) {
  Writer size;
  size.U64(message.size());
  if (Status status = SendAll(fd, size.data(), size.size(), Patience()); !status.ok()) {
    return status;
  }
  return SendAll(fd, message.data(), message.size(), Patience());
}

Result<std::vector<uint8_t>> RecvMessage(int fd) {
  uint8_t header[sizeof(uint64_t)];
  if (Status status = WaitReadable(fd, Deadline::In(std::chrono::hours(1))); !status.ok()) {
    return status;
  }
  if (Status status = RecvAll(fd, header, sizeof(header), Patience()); !status.ok()) {
    return status;
  }
  std::vector<uint8_t> message(Reader(header, sizeof(header)).U64());
  if (Status status = RecvAll(fd, message.data(), message.size(), Patience()); !status.ok()) {
    return status;
  }
  return message;
}

void PutCache(const RemoteCache &cache, Writer &out) {
  out.I64(cache.cache_id);
  out.U64(cache.generation);
  out.U32(cache.geometry.num_tensors);
  out.U64(cache.geometry.num_blocks);
  out.U64(cache.geometry.tensor_bytes);
  out.U64(cache.geometry.stride);
  out.U8(cache.geometry.tensors_overlap ? 1 : 0);
  out.Bytes(cache.blob.data(), cache.blob.size());
}

RemoteCache GetCache(Reader &in) {
  RemoteCache cache;
  cache.cache_id = in.I64();
  cache.generation = in.U64();
  cache.geometry.num_tensors = in.U32();
  cache.geometry.num_blocks = in.U64();
  cache.geometry.tensor_bytes = in.U64();
  cache.geometry.stride = in.U64();
  cache.geometry.tensors_overlap = in.U8() == 1;
  cache.blob.resize(in.remaining());
  in.Bytes(cache.blob.data(), cache.blob.size());
  return cache;
}

void AnswerRead(OwnerHere &owner, Reader &in, Writer &out) {
  std::vector<uint8_t> body(in.remaining());
  in.Bytes(body.data(), body.size());
  const auto request = Decode<PushRequest>(body);
  // Who made the channel, which the kernel knows.
  const auto initiator = PeerProcess::Of(kChannelFd);
  const Status status = request.ok() && initiator.ok()
                            ? owner.ReadFrom(initiator.value(), request.value())
                            : Status(llm_datadist::LLM_FAILED, "the owner process does not understand");
  out.U32(status.code());
  out.Text(status.text(), kMaxText);
}

void Answer(OwnerHere &owner, Reader in, Writer &out) {
  switch (static_cast<Command>(in.U8())) {
    case Command::kAddCache: {
      const CacheShape shape{in.U32(), in.U64(), in.U64(), in.U64()};
      PutCache(owner.AddCache(shape, in.U64()), out);
      return;
    }
    case Command::kUnregisterAndReuse:
      owner.UnregisterAndReuse(in.I64());
      return;
    case Command::kBytes: {
      const auto bytes = owner.Bytes(in.I64());
      out.Bytes(bytes.data(), bytes.size());
      return;
    }
    case Command::kCanariesIntact:
      out.U8(owner.CanariesIntact(in.I64()) ? 1 : 0);
      return;
    case Command::kListen:
      out.U16(owner.Listen());
      return;
    case Command::kServe: {
      const uint32_t connections = in.U32();
      owner.Serve(connections, std::chrono::milliseconds(in.U32()));
      return;
    }
    case Command::kRead:
      AnswerRead(owner, in, out);
      return;
  }
}

int OwnerMain() {
  OwnerHere owner;
  while (true) {
    const auto request = RecvMessage(kChannelFd);
    if (!request.ok()) {
      return 0;  // the test is over
    }
    Writer response;
    Answer(owner, Reader(request.value().data(), request.value().size()), response);
    if (!SendMessage(kChannelFd, response).ok()) {
      return 0;
    }
  }
}

Writer Request(Command command) {
  Writer request;
  request.U8(static_cast<uint8_t>(command));
  return request;
}

Writer Request(Command command, uint64_t argument) {
  Writer request = Request(command);
  request.U64(argument);
  return request;
}

}  // namespace

OwnerProcess::OwnerProcess() {
  int ends[2];
  EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
  channel_ = Fd(ends[0]);
  const Fd theirs(ends[1]);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, theirs.get(), kChannelFd);
  std::string program = "/proc/self/exe";
  std::string flag = kOwnerFlag;
  char *argv[] = {program.data(), flag.data(), nullptr};
  EXPECT_EQ(::posix_spawn(&pid_, program.c_str(), &actions, nullptr, argv, environ), 0);
  posix_spawn_file_actions_destroy(&actions);
}

OwnerProcess::~OwnerProcess() { Kill(); }

void OwnerProcess::Stop() {
  ASSERT_EQ(::kill(pid_, SIGSTOP), 0);
  int status = 0;
  ASSERT_EQ(::waitpid(pid_, &status, WUNTRACED), pid_);
  ASSERT_TRUE(WIFSTOPPED(status));
}

void OwnerProcess::Kill() {
  if (pid_ > 0) {
    (void)::kill(pid_, SIGKILL);
    (void)::waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }
}

std::vector<uint8_t> OwnerProcess::Call(const Writer &request) {
  const std::lock_guard<std::mutex> lock(call_mutex_);
  EXPECT_TRUE(SendMessage(channel_.get(), request).ok());
  auto response = RecvMessage(channel_.get());
  EXPECT_TRUE(response.ok()) << "the owner process ended";
  return response.ok() ? std::move(response).value() : std::vector<uint8_t>(1024);
}

RemoteCache OwnerProcess::AddCache(const CacheShape &shape, uint64_t seed) {
  Writer request = Request(Command::kAddCache);
  request.U32(shape.num_tensors);
  request.U64(shape.num_blocks);
  request.U64(shape.stride);
  request.U64(shape.distance);
  request.U64(seed);
  const auto response = Call(request);
  Reader in(response.data(), response.size());
  return GetCache(in);
}

void OwnerProcess::UnregisterAndReuse(int64_t cache_id) {
  (void)Call(Request(Command::kUnregisterAndReuse, static_cast<uint64_t>(cache_id)));
}

std::vector<uint8_t> OwnerProcess::Bytes(int64_t cache_id) {
  return Call(Request(Command::kBytes, static_cast<uint64_t>(cache_id)));
}

bool OwnerProcess::CanariesIntact(int64_t cache_id) {
  return Call(Request(Command::kCanariesIntact, static_cast<uint64_t>(cache_id))).at(0) == 1;
}

std::shared_ptr<const PeerProcess> OwnerProcess::Process() { return PeerProcess::OfChild(pid_).value(); }

uint16_t OwnerProcess::Listen() {
  const auto response = Call(Request(Command::kListen));
  return Reader(response.data(), response.size()).U16();
}

void OwnerProcess::Serve(size_t connections, std::chrono::milliseconds max_request) {
  Writer request = Request(Command::kServe);
  request.U32(static_cast<uint32_t>(connections));
  request.U32(static_cast<uint32_t>(max_request.count()));
  (void)Call(request);
}

Status OwnerProcess::Read(const PushRequest &push) {
  Writer request = Request(Command::kRead);
  const std::vector<uint8_t> body = Encode(push);
  request.Bytes(body.data(), body.size());
  const auto response = Call(request);
  Reader in(response.data(), response.size());
  const llm_datadist::Status code = in.U32();
  return code == llm_datadist::LLM_SUCCESS ? Status::Ok() : Status(code, in.Text(kMaxText));
}

int TestMain(int argc, char **argv) {
  if (argc == 2 && std::strcmp(argv[1], kOwnerFlag) == 0) {
    return OwnerMain();
  }
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}

}  // namespace datadist::test
