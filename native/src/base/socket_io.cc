#include "base/socket_io.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "base/iovecs.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_TIMEOUT;

enum class Direction { kSend, kRecv };

Status Broken(Direction direction, const std::string &why) {
  return Status(LLM_FAILED, std::string(direction == Direction::kSend ? "send: " : "receive: ") + why);
}

Status WaitFor(int fd, short events, Direction direction, Deadline deadline) {
  while (true) {
    const int left = deadline.PollMillis();
    if (left == 0) {
      return Status(LLM_TIMEOUT, direction == Direction::kSend ? "send: deadline passed" : "receive: deadline passed");
    }
    pollfd entry{fd, events, 0};
    const int ready = ::poll(&entry, 1, left);
    if (ready > 0) {
      return Status::Ok();  // errors and hang-ups show in the next send or receive, with their cause
    }
    if (ready < 0 && errno != EINTR) {
      return Broken(direction, ErrnoText(errno));
    }
  }
}

Status Move(int fd, iovec *iov, size_t count, Direction direction, Deadline deadline) {
  const bool sending = direction == Direction::kSend;
  AdvanceIovecs(iov, count, 0);
  while (count > 0) {
    msghdr message{};
    message.msg_iov = iov;
    message.msg_iovlen = std::min(count, kMaxIovecs);
    const ssize_t moved = sending ? ::sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
                                  : ::recvmsg(fd, &message, MSG_DONTWAIT);
    if (moved > 0) {
      AdvanceIovecs(iov, count, static_cast<size_t>(moved));
      if (count > 0 && deadline.Expired()) {  // a peer that trickles bytes never lets us come to poll()
        return Status(LLM_TIMEOUT, sending ? "send: deadline passed" : "receive: deadline passed");
      }
    } else if (moved == 0) {
      return Broken(direction, "connection closed by peer");
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      Status waited = WaitFor(fd, sending ? POLLOUT : POLLIN, direction, deadline);
      if (!waited.ok()) {
        return waited;
      }
    } else if (errno != EINTR) {
      return Broken(direction, ErrnoText(errno));
    }
  }
  return Status::Ok();
}

}  // namespace

std::string ErrnoText(int error) { return std::generic_category().message(error); }

Status SendAll(int fd, const void *data, size_t size, Deadline deadline) {
  iovec one{const_cast<void *>(data), size};
  return Move(fd, &one, 1, Direction::kSend, deadline);
}

Status RecvAll(int fd, void *data, size_t size, Deadline deadline) {
  iovec one{data, size};
  return Move(fd, &one, 1, Direction::kRecv, deadline);
}

Status SendVec(int fd, iovec *iov, size_t count, Deadline deadline) {
  return Move(fd, iov, count, Direction::kSend, deadline);
}

Status RecvVec(int fd, iovec *iov, size_t count, Deadline deadline) {
  return Move(fd, iov, count, Direction::kRecv, deadline);
}

size_t SendWithoutWaiting(int fd, const void *data, size_t size) {
  size_t sent = 0;
  while (sent < size) {
    const ssize_t some =
        ::send(fd, static_cast<const char *>(data) + sent, size - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (some >= 0) {
      sent += static_cast<size_t>(some);
    } else if (errno != EINTR) {
      break;
    }
  }
  return sent;
}

Status WaitReadable(int fd, Deadline deadline) { return WaitFor(fd, POLLIN, Direction::kRecv, deadline); }

}  // namespace datadist
