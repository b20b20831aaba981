#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "calls.h"
#include "named_tuple.h"
#include "provider/transfer_queue.h"
#include "register.h"

namespace py = pybind11;

namespace datadist::bindings {
namespace {

using std::chrono::milliseconds;

class QueueFull : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

std::unique_ptr<TransferQueue> ConstructQueue(const DataDist &datadist, int64_t threads, int64_t capacity) {
  auto made = TransferQueue::Create(datadist.provider, threads, capacity);
  if (made.ok()) {
    return std::move(made).value();
  }
  if (made.status().code() == llm_datadist::LLM_PARAM_INVALID) {
    throw py::value_error(made.status().text());
  }
  throw std::runtime_error(made.status().text());
}

// The pool's threads stayed in the parent: in a forked child nothing would ever complete, and reading the eventfd would
// take the parent's wake-up.
TransferQueue &Usable(TransferQueue &queue) {
  if (queue.in_forked_child()) {
    throw std::runtime_error("this TransferQueue belongs to the parent process; create one after fork()");
  }
  return queue;
}

uint64_t Submit(TransferQueue &self, Operation operation, int64_t deadline_ms) {
  const auto submission = Usable(self).Submit(std::move(operation), milliseconds(deadline_ms));
  switch (submission.verdict) {
    case TransferQueue::Verdict::kAccepted:
      return submission.id;
    case TransferQueue::Verdict::kFull:
      throw QueueFull("all " + std::to_string(self.capacity()) + " places of the queue are taken");
    case TransferQueue::Verdict::kClosed:
      break;
  }
  throw std::runtime_error("the queue is drained or closed");
}

uint64_t SubmitPullBlocks(TransferQueue &self, uint64_t src_cluster_id, int64_t src_cache_id, int64_t dst_cache_id,
                          py::handle src_blocks, py::handle dst_blocks, int64_t deadline_ms, LayerRange src_layers,
                          LayerRange dst_layers, uint8_t tensor_num_per_layer) {
  PullBlocksOp op{MakeTransfer<BlocksTransfer>(src_cluster_id, src_cache_id, dst_cache_id, 0)};
  op.transfer.ext = ToExtParam(src_layers, dst_layers, tensor_num_per_layer);
  Status read = ReadBlocks(src_blocks, dst_blocks, op.transfer);
  if (!read.ok()) {
    return Submit(self, RefusedOp{src_cluster_id, std::move(read)}, deadline_ms);
  }
  return Submit(self, std::move(op), deadline_ms);
}

uint64_t SubmitPushBlocks(TransferQueue &self, int64_t src_cache_id, uint64_t dst_cluster_id, int64_t dst_cache_id,
                          py::handle src_blocks, py::handle dst_blocks, uint32_t num_tensors, int64_t deadline_ms,
                          LayerRange src_layers, LayerRange dst_layers, uint8_t tensor_num_per_layer) {
  PushBlocksOp op{MakeTransfer<BlocksTransfer>(dst_cluster_id, dst_cache_id, src_cache_id, num_tensors)};
  op.transfer.ext = ToExtParam(src_layers, dst_layers, tensor_num_per_layer);
  Status read = ReadBlocks(src_blocks, dst_blocks, op.transfer);
  if (!read.ok()) {
    return Submit(self, RefusedOp{dst_cluster_id, std::move(read)}, deadline_ms);
  }
  return Submit(self, std::move(op), deadline_ms);
}

milliseconds FromSeconds(double seconds) {
  if (std::isnan(seconds)) {
    throw py::value_error("timeout_s is nan; allowed: a number of seconds");
  }
  constexpr double kLongest = 1e9;
  return milliseconds(std::llround(std::min(std::max(seconds, 0.0), kLongest) * 1e3));
}

bool Drain(TransferQueue &self, double timeout_s) {
  const milliseconds timeout = FromSeconds(timeout_s);
  TransferQueue &queue = Usable(self);
  const auto drained = WithoutGil([&] { return Result<bool>(queue.Drain(timeout)); });
  return drained.ok() && drained.value();
}

void Close(TransferQueue &self) {
  TransferQueue &queue = Usable(self);
  (void)WithoutGil([&] {
    queue.Close();
    return Status::Ok();
  });
}

py::list Poll(TransferQueue &self, const py::object &completion_type) {
  py::list completions;
  for (const Completion &c : Usable(self).Poll()) {
    completions.append(completion_type(c.id, c.status, c.cancelled, c.error, c.queued.count(), c.run.count()));
  }
  return completions;
}

void RegisterSubmits(py::class_<TransferQueue, std::unique_ptr<TransferQueue>> &queue) {
  const auto src_layers = py::arg("src_layer_range") = LayerRange{-1, -1};
  const auto dst_layers = py::arg("dst_layer_range") = LayerRange{-1, -1};
  const auto per_layer = py::arg("tensor_num_per_layer") = 2;
  queue
      .def("submit_pull_blocks", &SubmitPullBlocks, py::arg("src_cluster_id"), py::arg("src_cache_id"),
           py::arg("dst_cache_id"), py::arg("src_blocks"), py::arg("dst_blocks"), py::arg("deadline_ms"), src_layers,
           dst_layers, per_layer)
      .def("submit_push_blocks", &SubmitPushBlocks, py::arg("src_cache_id"), py::arg("dst_cluster_id"),
           py::arg("dst_cache_id"), py::arg("src_blocks"), py::arg("dst_blocks"), py::arg("num_tensors"),
           py::arg("deadline_ms"), src_layers, dst_layers, per_layer)
      .def(
          "submit_link",
          [](TransferQueue &self, const ClusterArgument &cluster, int32_t timeout_ms, int64_t deadline_ms) {
            return Submit(self, LinkOp{ToClusterInfo(cluster), timeout_ms}, deadline_ms);
          },
          py::arg("cluster"), py::arg("timeout_ms"), py::arg("deadline_ms"))
      .def(
          "submit_unlink",
          [](TransferQueue &self, const ClusterArgument &cluster, int32_t timeout_ms, int64_t deadline_ms, bool force) {
            return Submit(self, UnlinkOp{ToClusterInfo(cluster), timeout_ms, force}, deadline_ms);
          },
          py::arg("cluster"), py::arg("timeout_ms"), py::arg("deadline_ms"), py::arg("force") = false);
}

}  // namespace

void RegisterTransferQueue(py::module_ &module) {
  py::register_exception<QueueFull>(module, "QueueFullError", PyExc_RuntimeError);
  const py::object completion = DefineNamedTuple(module, "Completion",
                                                 {{"id", "int"},
                                                  {"status", "int"},
                                                  {"cancelled", "bool"},
                                                  {"error", "str"},
                                                  {"queued_s", "float"},
                                                  {"run_s", "float"}});

  // Destruction waits for running operations. It must: they write into memory that the caller frees next.
  py::class_<TransferQueue, std::unique_ptr<TransferQueue>> queue(module, "TransferQueue",
                                                                  py::release_gil_before_calling_cpp_dtor());
  queue
      .def(py::init(&ConstructQueue), py::arg("datadist"), py::arg("threads") = 4, py::arg("capacity") = 4096)
      .def("poll", [completion](TransferQueue &self) { return Poll(self, completion); })
      .def(
          "cancel",
          [](TransferQueue &self, int64_t id) { return id > 0 && Usable(self).Cancel(static_cast<uint64_t>(id)); },
          py::arg("id"))
      .def("drain", &Drain, py::arg("timeout_s"))
      .def("fileno", [](TransferQueue &self) { return Usable(self).event_fd(); })
      .def("close", &Close);
  RegisterSubmits(queue);
}

}  // namespace datadist::bindings
