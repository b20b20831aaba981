// The owner's end of a data connection.
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <exception>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "base/log.h"
#include "base/socket_io.h"
#include "transport/tcp/stream.h"
#include "transport/tcp/tcp_data_path.h"
#include "transport/tcp/wire.h"

namespace datadist {
namespace {

using std::chrono::milliseconds;

// The pin of what a request names, with every span checked against it.
Result<CachePin> PinRequested(RegionTable &regions, const RequestHeader &header, const std::vector<Span> &spans) {
  const PeerUse use = header.op == DataOp::kPull ? PeerUse::kRead : PeerUse::kWrite;
  Result<CachePin> pin = regions.PinForPeer(header.cache_id, header.generation, use);
  if (!pin.ok()) {
    return pin;
  }
  const uint64_t last_tensor = uint64_t{header.first_tensor} + header.tensor_count - 1;
  for (const Span &span : spans) {
    if (const auto range = pin.value().Resolve(last_tensor, span.offset, span.length); !range.ok()) {
      return range.status();
    }
  }
  return pin;
}

}  // namespace

struct TcpServer::State {
  State(Fd given_stream, std::shared_ptr<RegionTable> given_regions, milliseconds given_max_request)
      : stream(std::move(given_stream)), regions(std::move(given_regions)), max_request(given_max_request) {}

  Fd stream;  // closed only after the thread ended
  std::shared_ptr<RegionTable> regions;
  milliseconds max_request;
  std::thread thread;
  std::mutex joining;  // several may wait for its end

  void End() { (void)::shutdown(stream.get(), SHUT_RDWR); }

  void Serve() {
    try {
      while (WaitReadable(stream.get()).ok() && ServeOne().ok()) {
      }
    } catch (const std::exception &error) {
      Log(LogLevel::kError, std::string("data connection: ") + error.what());
    }
    End();  // the peer must not wait for an answer that never comes
  }

  // Anything but ok ends the connection: its framing is lost.
  Status ServeOne() {
    const Deadline limit = Deadline::In(max_request);
    std::array<uint8_t, kRequestHeaderBytes> bytes;
    if (Status status = RecvAll(stream.get(), bytes.data(), bytes.size(), limit); !status.ok()) {
      return status;
    }
    const Result<RequestHeader> header = DecodeRequestHeader(bytes.data());
    if (!header.ok()) {
      return header.status();
    }
    const Deadline deadline = Deadline::Earlier(limit, Deadline::In(milliseconds(header.value().remaining_ms)));
    std::vector<uint8_t> span_bytes;
    if (Status status = RecvGrowing(header.value().span_count * kSpanBytes, span_bytes, deadline); !status.ok()) {
      return status;
    }
    const Result<std::vector<Span>> spans = DecodeSpans(span_bytes.data(), header.value());
    return spans.ok() ? Answer(header.value(), spans.value(), deadline) : spans.status();
  }

  // Takes memory as the bytes come: an announcement costs its sender nothing.
  Status RecvGrowing(size_t size, std::vector<uint8_t> &bytes, Deadline deadline) {
    constexpr size_t kFirst = 4096;
    while (bytes.size() < size) {
      const size_t filled = bytes.size();
      bytes.resize(std::min(size, std::max(kFirst, 2 * filled)));
      if (Status status = RecvAll(stream.get(), bytes.data() + filled, bytes.size() - filled, deadline);
          !status.ok()) {
        return status;
      }
    }
    return Status::Ok();
  }

  Status Answer(const RequestHeader &header, const std::vector<Span> &spans, Deadline deadline) {
    Result<CachePin> pinned = PinRequested(*regions, header, spans);
    if (!pinned.ok()) {
      return Respond(pinned.status(), header, deadline);
    }
    CachePin pin = std::move(pinned).value();
    if (Status status = Respond(Status::Ok(), header, deadline); !status.ok()) {
      return status;
    }
    if (header.op == DataOp::kPull) {
      return SendSpans(stream.get(), std::move(pin), header.first_tensor, header.tensor_count, spans, deadline);
    }
    Status moved = StreamSpans(stream.get(), StreamDirection::kRecv, pin, header.first_tensor, header.tensor_count,
                               spans, deadline);
    pin = CachePin();  // before "done": who was told may unregister at once
    return moved.ok() ? Respond(Status::Ok(), header, deadline) : moved;
  }

  Status Respond(const Status &status, const RequestHeader &header, Deadline deadline) {
    Writer response;
    EncodeResponse(status, header.total_bytes, response);
    return SendAll(stream.get(), response.data(), response.size(), deadline);
  }
};

TcpServer::TcpServer(Fd stream, std::shared_ptr<RegionTable> regions, milliseconds max_request)
    : state_(std::make_unique<State>(std::move(stream), std::move(regions), max_request)) {
  TuneStream(state_->stream.get());
  try {
    state_->thread = std::thread([state = state_.get()] { state->Serve(); });
  } catch (const std::system_error &) {
    state_->End();  // no thread to serve it: the peer sees a closed connection, as with any other loss
  }
}

TcpServer::~TcpServer() {
  Close();
  Join();
}

void TcpServer::Join() {
  const std::lock_guard<std::mutex> lock(state_->joining);
  if (state_->thread.joinable()) {
    state_->thread.join();
  }
}

void TcpServer::Close() { state_->End(); }

}  // namespace datadist
