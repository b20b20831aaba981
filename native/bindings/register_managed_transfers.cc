#include <pybind11/stl.h>

#include <utility>

#include "block_ids.h"
#include "managed.h"

namespace py = pybind11;

namespace datadist::bindings {
namespace {

LayerChoice ToLayers(const SpanArgument &src, const SpanArgument &dst, uint32_t tensors_per_layer) {
  const auto span = [](const SpanArgument &given) -> std::optional<LayerSpan> {
    if (!given.has_value()) {
      return std::nullopt;
    }
    // An end before the start is an empty span, which no check lets through.
    return LayerSpan{given->first, given->second > given->first ? given->second - given->first : 0};
  };
  return LayerChoice{span(src), span(dst), tensors_per_layer};
}

llm_datadist::Status PullRows(ManagedDataDist &self, uint64_t src_cluster_id, const RefArgument &src,
                              int64_t dst_cache_id, uint32_t src_row, uint32_t dst_row, int64_t size,
                              const SpanArgument &src_layers, const SpanArgument &dst_layers,
                              uint32_t tensors_per_layer, uint64_t src_offset, uint64_t dst_offset) {
  const Result<CacheRef> ref = ToRef(src);
  if (!ref.ok()) {
    return Report(ref.status());
  }
  const PullTarget target{src_cluster_id, ref.value(), src_row, dst_cache_id,
                          ToLayers(src_layers, dst_layers, tensors_per_layer)};
  const RowMove move{src_row, dst_row, size, src_offset, dst_offset};
  return Report(WithoutGil([&] { return self.extension().Pull(target, move); }));
}

llm_datadist::Status PullBlocks(ManagedDataDist &self, uint64_t src_cluster_id, const RefArgument &src,
                                int64_t dst_cache_id, py::handle src_blocks, py::handle dst_blocks, uint32_t src_row,
                                const SpanArgument &src_layers, const SpanArgument &dst_layers,
                                uint32_t tensors_per_layer) {
  const Result<BlockLists> lists = ReadBlockLists(src_blocks, dst_blocks);
  if (!lists.ok()) {
    return Report(lists.status());
  }
  const BlockLists &blocks = lists.value();
  const Result<CacheRef> ref = ToRef(src);
  if (!ref.ok()) {
    return Report(ref.status());
  }
  const PullTarget target{src_cluster_id, ref.value(), src_row, dst_cache_id,
                          ToLayers(src_layers, dst_layers, tensors_per_layer)};
  const bool pieces = blocks.src.empty() && !blocks.dst.empty();
  const Move move = pieces ? Move(PieceMove{src_row, 0, blocks.dst}) : Move(BlockMove{blocks.src, blocks.dst});
  return Report(WithoutGil([&] { return self.extension().Pull(target, move); }));
}

// What a push moves, by which lists are given: none, both, or only the destination's.
Move ToPushMove(const BlockLists &blocks, uint32_t src_row, uint32_t dst_row, uint64_t dst_block_bytes) {
  if (blocks.src.empty() && blocks.dst.empty()) {
    return RowMove{src_row, dst_row, -1, 0, 0};
  }
  if (blocks.src.empty()) {
    return PieceMove{src_row, dst_block_bytes, blocks.dst};
  }
  return BlockMove{blocks.src, blocks.dst};
}

llm_datadist::Status PushLayer(ManagedDataDist &self, int64_t src_cache_id, int64_t src_layer, uint64_t dst_cluster_id,
                               const RefArgument &dst, int64_t dst_layer, uint32_t src_row, uint32_t dst_row,
                               py::handle src_blocks, py::handle dst_blocks, uint64_t dst_block_bytes,
                               uint32_t tensors_per_layer) {
  const Result<BlockLists> lists = ReadBlockLists(src_blocks, dst_blocks);
  if (!lists.ok()) {
    return Report(lists.status());
  }
  const Result<CacheRef> ref = ToRef(dst);
  if (!ref.ok()) {
    return Report(ref.status());
  }
  const PushTarget target{src_cache_id, src_layer, dst_cluster_id, dst_layer, tensors_per_layer};
  const Move move = ToPushMove(lists.value(), src_row, dst_row, dst_block_bytes);
  return Report(WithoutGil([&] { return self.extension().PushLayer(target, ref.value(), move); }));
}

llm_datadist::Status PushLayerToAddrs(ManagedDataDist &self, int64_t src_cache_id, int64_t src_layer,
                                      uint64_t dst_cluster_id, const std::vector<uint64_t> &dst_addrs,
                                      uint32_t src_row, py::handle src_blocks, py::handle dst_blocks,
                                      uint64_t dst_block_bytes) {
  const Result<BlockLists> lists = ReadBlockLists(src_blocks, dst_blocks);
  if (!lists.ok()) {
    return Report(lists.status());
  }
  const PushTarget target{src_cache_id, src_layer, dst_cluster_id, 0, static_cast<uint32_t>(dst_addrs.size())};
  const Move move = ToPushMove(lists.value(), src_row, 0, dst_block_bytes);
  return Report(WithoutGil([&] { return self.extension().PushLayerToAddresses(target, dst_addrs, move); }));
}

}  // namespace

void RegisterManagedTransfers(ManagedClass &managed) {
  const auto src_layers = py::arg("src_layers") = SpanArgument();
  const auto dst_layers = py::arg("dst_layers") = SpanArgument();
  const auto per_layer = py::arg("tensor_num_per_layer") = 2;
  const auto src_row = py::arg("src_batch_index") = 0;
  const auto dst_row = py::arg("dst_batch_index") = 0;
  const auto src_blocks = py::arg("src_blocks") = py::tuple();
  const auto dst_blocks = py::arg("dst_blocks") = py::tuple();
  const auto dst_block_bytes = py::arg("dst_block_bytes") = 0;
  managed
      .def("pull_rows", &PullRows, py::arg("src_cluster_id"), py::arg("src"), py::arg("dst_cache_id"), src_row, dst_row,
           py::arg("size") = -1, src_layers, dst_layers, per_layer, py::arg("src_offset") = 0,
           py::arg("dst_offset") = 0)
      .def("pull_blocks", &PullBlocks, py::arg("src_cluster_id"), py::arg("src"), py::arg("dst_cache_id"),
           py::arg("src_blocks"), py::arg("dst_blocks"), src_row, src_layers, dst_layers, per_layer)
      .def("push_layer", &PushLayer, py::arg("src_cache_id"), py::arg("src_layer"), py::arg("dst_cluster_id"),
           py::arg("dst"), py::arg("dst_layer"), src_row, dst_row, src_blocks, dst_blocks, dst_block_bytes, per_layer)
      .def("push_layer_to_addrs", &PushLayerToAddrs, py::arg("src_cache_id"), py::arg("src_layer"),
           py::arg("dst_cluster_id"), py::arg("dst_addrs"), src_row, src_blocks, dst_blocks, dst_block_bytes);
}

}  // namespace datadist::bindings
