#include "support/peer_process.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <sstream>
#include <stdexcept>

namespace datadist::testing {
namespace {

constexpr char kPeerFlag[] = "--datadist-test-peer";
constexpr int kPeerFd = 3;

void WriteAll(int fd, const void *data, size_t size) {
  const auto *next = static_cast<const char *>(data);
  while (size > 0) {
    const ssize_t written = ::send(fd, next, size, MSG_NOSIGNAL);
    if (written <= 0) {
      throw std::runtime_error("the peer process is gone");
    }
    next += written;
    size -= static_cast<size_t>(written);
  }
}

bool ReadAll(int fd, void *data, size_t size) {
  return size == 0 || ::recv(fd, data, size, MSG_WAITALL) == static_cast<ssize_t>(size);
}

std::string Join(const Blocks &blocks) {
  std::ostringstream text;
  text << blocks.size();
  for (const uint64_t block : blocks) {
    text << ' ' << block;
  }
  return text.str();
}

Blocks ReadBlocks(std::istream &in) {
  size_t count = 0;
  in >> count;
  Blocks blocks(count);
  for (uint64_t &block : blocks) {
    in >> block;
  }
  return blocks;
}

// One command; the answer is a number, but for "contents", which answers with bytes too.
std::string Obey(std::unique_ptr<Node> &node, const std::string &line, Bytes &bytes) {
  std::istringstream in(line);
  std::string command;
  in >> command;
  if (command == "start") {
    uint64_t id = 0;
    TextOptions options;
    in >> id;
    for (std::string key, value; in >> key >> value;) {
      options[key] = value;
    }
    node = std::make_unique<Node>(id);
    return std::to_string(node->Start(options));
  }
  if (command == "port") {
    return std::to_string(node->port());
  }
  int64_t a = 0;
  int64_t b = 0;
  uint64_t cluster = 0;
  if (command == "cache") {
    Shape shape;
    uint32_t seed = 0;
    in >> shape.tensors >> shape.blocks >> shape.stride >> seed;
    return std::to_string(node->AddCache(shape, seed));
  }
  if (command == "contents") {
    in >> a;
    bytes = node->Contents(a);
    return std::to_string(bytes.size());
  }
  if (command == "link") {
    uint16_t port = 0;
    in >> cluster >> port;
    return std::to_string(node->Link(cluster, port));
  }
  if (command == "unregister") {
    in >> a;
    return std::to_string(node->datadist().UnregisterKvCache(a));
  }
  if (command == "alive") {
    in >> cluster;
    return std::to_string(node->Alive(cluster) ? 1 : 0);
  }
  in >> cluster >> a >> b;
  const Blocks src = ReadBlocks(in);
  const Blocks dst = ReadBlocks(in);
  return std::to_string(command == "pull" ? node->Pull(cluster, a, b, src, dst) : node->Push(a, cluster, b, src, dst));
}

}  // namespace

void RunIfPeer(int argc, char **argv) {
  if (argc < 2 || std::strcmp(argv[1], kPeerFlag) != 0) {
    return;
  }
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);  // a crashed test must not leave it behind
  std::unique_ptr<Node> node;
  std::string line;
  for (char c = 0; ReadAll(kPeerFd, &c, 1);) {
    if (c != '\n') {
      line += c;
      continue;
    }
    Bytes bytes;
    const std::string answer = Obey(node, line, bytes) + "\n";
    WriteAll(kPeerFd, answer.data(), answer.size());
    WriteAll(kPeerFd, bytes.data(), bytes.size());
    line.clear();
  }
  node.reset();
  std::exit(0);
}

PeerProcess::PeerProcess() {
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
    throw std::runtime_error("socketpair");
  }
  channel_ = Fd(ends[0]);
  pid_ = ::fork();  // the child's end is no Fd yet: of those it has none
  if (pid_ == 0) {
    // dup2 onto itself would keep close-on-exec.
    if (ends[1] == kPeerFd) {
      ::fcntl(kPeerFd, F_SETFD, 0);
    } else {
      ::dup2(ends[1], kPeerFd);
    }
    ::execl("/proc/self/exe", "peer", kPeerFlag, nullptr);
    ::_exit(127);
  }
  ::close(ends[1]);
}

PeerProcess::~PeerProcess() {
  if (pid_ > 0) {
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }
}

void PeerProcess::Signal(int signal) {
  ::kill(pid_, signal);
  if (signal == SIGKILL) {
    ::waitpid(pid_, nullptr, 0);
    pid_ = -1;
  } else if (signal == SIGSTOP) {
    ::waitpid(pid_, nullptr, WUNTRACED);
  }
}

std::string PeerProcess::ReadLine() {
  std::string line;
  for (char c = 0;; line += c) {
    if (!ReadAll(channel_.get(), &c, 1)) {
      throw std::runtime_error("the peer process is gone");
    }
    if (c == '\n') {
      return line;
    }
  }
}

std::string PeerProcess::Ask(const std::string &command) {
  const std::string line = command + "\n";
  WriteAll(channel_.get(), line.data(), line.size());
  return ReadLine();
}

uint64_t PeerProcess::AskNumber(const std::string &command) { return std::stoull(Ask(command)); }

llm_datadist::Status PeerProcess::Start(uint64_t cluster_id, const TextOptions &options) {
  std::string command = "start " + std::to_string(cluster_id);
  for (const auto &[key, value] : options) {
    command += " " + key + " " + value;
  }
  return static_cast<llm_datadist::Status>(AskNumber(command));
}

uint16_t PeerProcess::port() { return static_cast<uint16_t>(AskNumber("port")); }

int64_t PeerProcess::AddCache(const Shape &shape, uint32_t seed) {
  std::ostringstream command;
  command << "cache " << shape.tensors << ' ' << shape.blocks << ' ' << shape.stride << ' ' << seed;
  return static_cast<int64_t>(AskNumber(command.str()));
}

Bytes PeerProcess::Contents(int64_t cache_id) {
  Bytes bytes(AskNumber("contents " + std::to_string(cache_id)));
  if (!ReadAll(channel_.get(), bytes.data(), bytes.size())) {
    throw std::runtime_error("the peer process is gone");
  }
  return bytes;
}

llm_datadist::Status PeerProcess::Link(uint64_t remote_id, uint16_t port) {
  return static_cast<llm_datadist::Status>(
      AskNumber("link " + std::to_string(remote_id) + " " + std::to_string(port)));
}

llm_datadist::Status PeerProcess::Unregister(int64_t cache_id) {
  return static_cast<llm_datadist::Status>(AskNumber("unregister " + std::to_string(cache_id)));
}

llm_datadist::Status PeerProcess::Pull(uint64_t cluster, int64_t src_cache, int64_t dst_cache, const Blocks &src,
                                       const Blocks &dst) {
  std::ostringstream command;
  command << "pull " << cluster << ' ' << src_cache << ' ' << dst_cache << ' ' << Join(src) << ' ' << Join(dst);
  return static_cast<llm_datadist::Status>(AskNumber(command.str()));
}

llm_datadist::Status PeerProcess::Push(int64_t src_cache, uint64_t cluster, int64_t dst_cache, const Blocks &src,
                                       const Blocks &dst) {
  std::ostringstream command;
  command << "push " << cluster << ' ' << src_cache << ' ' << dst_cache << ' ' << Join(src) << ' ' << Join(dst);
  return static_cast<llm_datadist::Status>(AskNumber(command.str()));
}

bool PeerProcess::Alive(uint64_t cluster) { return AskNumber("alive " + std::to_string(cluster)) != 0; }

}  // namespace datadist::testing
