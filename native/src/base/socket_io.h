// Whole reads and writes on a connected stream socket, each bounded by a deadline.
//
// Results: ok, or LLM_TIMEOUT when the deadline passed, or LLM_FAILED when the connection is closed or broken. After
// anything but ok an unknown part of the bytes has moved, so the stream's framing is lost and it can only be closed.
// The socket may be blocking or not; shutdown() from another thread ends a running call with LLM_FAILED. No SIGPIPE.
#ifndef DATADIST_BASE_SOCKET_IO_H_
#define DATADIST_BASE_SOCKET_IO_H_

#include <sys/uio.h>

#include <cstddef>
#include <string>

#include "base/deadline.h"
#include "base/status.h"

namespace datadist {

Status SendAll(int fd, const void *data, size_t size, Deadline deadline);
Status RecvAll(int fd, void *data, size_t size, Deadline deadline);

// Scatter/gather over any number of iovecs; each system call takes a bounded share of them. `iov` is used up.
Status SendVec(int fd, iovec *iov, size_t count, Deadline deadline);
Status RecvVec(int fd, iovec *iov, size_t count, Deadline deadline);

// As many of the bytes as the socket takes at once. A broken connection takes none, and says why to who reads from it.
size_t SendWithoutWaiting(int fd, const void *data, size_t size);

// Waits until the socket has bytes or has ended.
Status WaitReadable(int fd, Deadline deadline);

// "Connection reset by peer" and so on.
std::string ErrnoText(int error);

}  // namespace datadist

#endif  // DATADIST_BASE_SOCKET_IO_H_
