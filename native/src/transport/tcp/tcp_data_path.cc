// The initiator's end of the data connections of one link.
#include "transport/tcp/tcp_data_path.h"

#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <string>
#include <utility>

#include "base/socket_io.h"
#include "transport/pieces.h"
#include "transport/tcp/slices.h"
#include "transport/tcp/stream.h"
#include "transport/tcp/wire.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;

// The owner's answer to one request. `broken` says whether the connection is still usable.
struct Outcome {
  Status status;
  bool broken = false;
};
Outcome Broken(Status status) { return {std::move(status), true}; }

Outcome ReadResponse(int fd, uint64_t total_bytes, Deadline deadline) {
  std::array<uint8_t, kResponseHeaderBytes> bytes;
  if (Status status = RecvAll(fd, bytes.data(), bytes.size(), deadline); !status.ok()) {
    return Broken(std::move(status));
  }
  const Result<ResponseHeader> header = DecodeResponseHeader(bytes.data());
  if (!header.ok()) {
    return Broken(header.status());
  }
  std::string text(header.value().text_bytes, '\0');
  if (Status status = RecvAll(fd, text.data(), text.size(), deadline); !status.ok()) {
    return Broken(std::move(status));
  }
  if (header.value().total_bytes != total_bytes) {
    return Broken(Status(LLM_FAILED, "the peer answers another request"));
  }
  if (header.value().status == llm_datadist::LLM_SUCCESS) {
    return {};
  }
  return {Status(header.value().status, "refused by the peer: " + text), false};
}

// One request from its header to its last byte.
Outcome Exchange(int fd, DataOp data_op, const TransferOp &op, const OpSlice &slice, Deadline deadline) {
  RequestHeader header;
  header.op = data_op;
  header.remaining_ms = deadline.WireMillis();
  header.cache_id = op.remote->cache_id;
  header.generation = op.remote->generation;
  header.first_tensor = op.remote_first_tensor + slice.first_tensor;
  header.tensor_count = slice.tensor_count;
  header.span_count = static_cast<uint32_t>(slice.remote.size());
  header.total_bytes = slice.total_bytes;
  Writer request;
  EncodeRequest(header, slice.remote, request);
  if (Status status = SendAll(fd, request.data(), request.size(), deadline); !status.ok()) {
    return Broken(std::move(status));
  }
  if (Outcome go = ReadResponse(fd, slice.total_bytes, deadline); !go.status.ok()) {
    return go;
  }
  const bool pull = data_op == DataOp::kPull;
  Status moved = StreamSpans(fd, pull ? StreamDirection::kRecv : StreamDirection::kSend, *op.local,
                             op.local_first_tensor + slice.first_tensor, slice.tensor_count, slice.local, deadline);
  if (!moved.ok()) {
    return Broken(std::move(moved));
  }
  return pull ? Outcome{} : ReadResponse(fd, slice.total_bytes, deadline);
}

// Of several parts the one that failed first says why: it takes the others down with it.
class FirstFailure {
 public:
  void Record(const Status &status) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (first_.ok() && !status.ok()) {
      first_ = status;
    }
  }
  Status Get() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return first_;
  }

 private:
  std::mutex mutex_;
  Status first_;
};

class TcpDataPath final : public DataPath {
 public:
  TcpDataPath(std::vector<Fd> streams, std::shared_ptr<WorkerPool> pool)
      : streams_(std::move(streams)), pool_(std::move(pool)) {
    for (const Fd &stream : streams_) {
      TuneStream(stream.get());
    }
    if (streams_.empty()) {
      Break("none was made");
    }
  }

  Status Pull(const TransferOp &op, Deadline deadline) override { return Transfer(DataOp::kPull, op, deadline); }
  Status Push(const TransferOp &op, Deadline deadline) override { return Transfer(DataOp::kPush, op, deadline); }
  void Close() override { Break("the link was closed"); }

 private:
  Status Transfer(DataOp data_op, const TransferOp &op, Deadline deadline);
  static Outcome MovePart(int fd, DataOp data_op, const TransferOp &op, const std::vector<OpSlice> &slices,
                          Deadline deadline);
  // Ends running and later calls. The first reason stays.
  void Break(const std::string &reason);
  Status BrokenStatus();

  const std::vector<Fd> streams_;  // closed only when the path dies: a running call still uses them
  const std::shared_ptr<WorkerPool> pool_;
  std::mutex mutex_;
  bool broken_ = false;
  std::string reason_;
};

Status TcpDataPath::Transfer(DataOp data_op, const TransferOp &op, Deadline deadline) {
  const Result<uint64_t> total = CheckOp(op);
  if (!total.ok()) {
    return total.status();
  }
  if (Status status = BrokenStatus(); !status.ok()) {
    return status;
  }
  if (deadline.Expired()) {
    return Status(llm_datadist::LLM_TIMEOUT, "deadline passed before the transfer began");
  }
  const bool in_order = data_op == DataOp::kPull ? OrderMatters(op, Side::kLocal, op.local->cache().geometry())
                                                 : OrderMatters(op, Side::kRemote, op.remote->geometry);
  const size_t parts = PartCount(total.value(), streams_.size(), in_order);
  const uint64_t per_tensor = total.value() / op.tensor_count;
  FirstFailure failure;
  pool_->Run(parts, [&](size_t part) {
    const auto slices = SliceOp(op, PartOf(per_tensor, op.tensor_count, part, parts), in_order);
    const Outcome outcome = MovePart(streams_[part].get(), data_op, op, slices, deadline);
    failure.Record(outcome.status);
    if (outcome.broken) {
      Break(outcome.status.text());
    }
  });
  return failure.Get();
}

Outcome TcpDataPath::MovePart(int fd, DataOp data_op, const TransferOp &op, const std::vector<OpSlice> &slices,
                              Deadline deadline) {
  for (const OpSlice &slice : slices) {
    Outcome outcome = Exchange(fd, data_op, op, slice, deadline);
    if (!outcome.status.ok()) {
      return outcome;
    }
  }
  return {};
}

void TcpDataPath::Break(const std::string &reason) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (broken_) {
    return;
  }
  broken_ = true;
  reason_ = reason;
  for (const Fd &stream : streams_) {
    (void)::shutdown(stream.get(), SHUT_RDWR);
  }
}

Status TcpDataPath::BrokenStatus() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return broken_ ? Status(LLM_FAILED, "the data connections are closed: " + reason_) : Status::Ok();
}

}  // namespace

std::unique_ptr<DataPath> MakeTcpDataPath(std::vector<Fd> streams, std::shared_ptr<WorkerPool> pool) {
  return std::make_unique<TcpDataPath>(std::move(streams), std::move(pool));
}

}  // namespace datadist
