// Frames on a bare socket, as a client of no key sends and gets them.
#ifndef DATADIST_TESTS_SUPPORT_FRAMES_H_
#define DATADIST_TESTS_SUPPORT_FRAMES_H_

#include <optional>
#include <utility>
#include <vector>

#include "base/socket_io.h"
#include "control/frame.h"

namespace datadist::testing {

inline Status SendFrame(int fd, MessageType type, uint32_t seq, const std::vector<uint8_t> &body, Deadline deadline) {
  const std::vector<uint8_t> bytes = EncodeFrame(type, seq, body);
  return SendAll(fd, bytes.data(), bytes.size(), deadline);
}

inline Result<Frame> RecvFrame(int fd, TypeSet legal, Deadline deadline) {
  FrameReader reader;
  while (true) {
    const size_t size = reader.wanted();
    if (Status status = RecvAll(fd, reader.next(), size, deadline); !status.ok()) {
      return status;
    }
    Result<std::optional<Frame>> frame = reader.Filled(size, legal);
    if (!frame.ok()) {
      return frame.status();
    }
    if (frame.value().has_value()) {
      return *std::move(frame).value();
    }
  }
}

}  // namespace datadist::testing

#endif  // DATADIST_TESTS_SUPPORT_FRAMES_H_
