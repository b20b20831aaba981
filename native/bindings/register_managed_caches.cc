#include <pybind11/stl.h>

#include <utility>

#include "arguments.h"
#include "block_ids.h"
#include "endpoint.h"
#include "managed.h"

namespace py = pybind11;

namespace datadist::bindings {
namespace {

using KeyArguments = std::vector<std::optional<KeyArgument>>;

llm_datadist::CacheDesc ToDesc(uint32_t num_tensors, const std::vector<int64_t> &shape, int32_t data_type,
                               uint32_t placement) {
  llm_datadist::CacheDesc desc{};
  desc.placement = static_cast<llm_datadist::CachePlacement>(placement);
  desc.num_tensors = num_tensors;
  desc.data_type = ToDataType(data_type);
  desc.shape = shape;
  return desc;
}

Result<CacheLayout> ToLayout(int32_t layout) {
  if (layout < static_cast<int32_t>(CacheLayout::kContiguous) || layout > static_cast<int32_t>(CacheLayout::kBlocks)) {
    return Status(llm_datadist::LLM_PARAM_INVALID, "layout " + std::to_string(layout) + ", allowed: 1, 2");
  }
  return static_cast<CacheLayout>(layout);
}

std::pair<llm_datadist::Status, int64_t> RegisterCache(ManagedDataDist &self, int32_t layout, uint32_t num_tensors,
                                                       const std::vector<int64_t> &shape, int32_t data_type,
                                                       uint32_t placement, const std::vector<uint64_t> &addrs,
                                                       const KeyArguments &keys, bool remote_accessible) {
  const Result<CacheLayout> known_layout = ToLayout(layout);
  const Result<RowKeys> row_keys = ToRowKeys(keys);
  if (!known_layout.ok() || !row_keys.ok()) {
    return {Report(known_layout.ok() ? row_keys.status() : known_layout.status()), -1};
  }
  const auto desc = ToDesc(num_tensors, shape, data_type, placement);
  const Registration registration{known_layout.value(), remote_accessible, false};
  return ReportResult(
      WithoutGil([&] { return self.extension().RegisterCache(desc, addrs, registration, row_keys.value()); }),
      int64_t{-1});
}

std::tuple<llm_datadist::Status, int64_t, std::vector<uint64_t>> AllocateCache(
    ManagedDataDist &self, int32_t layout, uint32_t num_tensors, const std::vector<int64_t> &shape, int32_t data_type,
    uint32_t placement, const KeyArguments &keys) {
  const Result<CacheLayout> known_layout = ToLayout(layout);
  const Result<RowKeys> row_keys = ToRowKeys(keys);
  if (!known_layout.ok() || !row_keys.ok()) {
    return {Report(known_layout.ok() ? row_keys.status() : known_layout.status()), -1, {}};
  }
  const auto desc = ToDesc(num_tensors, shape, data_type, placement);
  const auto made =
      WithoutGil([&] { return self.extension().AllocateCache(desc, known_layout.value(), row_keys.value()); });
  if (!made.ok()) {
    return {Report(made.status()), -1, {}};
  }
  return {Report(Status::Ok()), made.value().cache_id, made.value().tensor_addrs};
}

llm_datadist::Status RemoveCacheKey(ManagedDataDist &self, const KeyArgument &argument) {
  const Result<CacheKey> key = ToKey(argument);
  return Report(key.ok() ? WithoutGil([&] { return self.extension().RemoveCacheKey(key.value()); }) : key.status());
}

llm_datadist::Status CopyBlocks(ManagedDataDist &self, int64_t cache_id, py::handle src_blocks,
                                py::handle dst_blocks) {
  const Result<BlockLists> lists = ReadBlockLists(src_blocks, dst_blocks);
  if (!lists.ok()) {
    return Report(lists.status());
  }
  const BlockMove move{lists.value().src, lists.value().dst};
  return Report(WithoutGil([&] { return self.extension().CopyBlocks(cache_id, move); }));
}

llm_datadist::Status SwapBlocks(ManagedDataDist &self, int64_t src_cache_id, const std::vector<uint64_t> &src_addrs,
                                int64_t dst_cache_id, const std::vector<uint64_t> &dst_addrs, uint64_t block_bytes,
                                py::handle src_blocks, py::handle dst_blocks) {
  const Result<BlockLists> lists = ReadBlockLists(src_blocks, dst_blocks);
  if (!lists.ok()) {
    return Report(lists.status());
  }
  const BlockMove move{lists.value().src, lists.value().dst};
  const CopySide from{src_cache_id, src_addrs};
  const CopySide to{dst_cache_id, dst_addrs};
  return Report(WithoutGil([&] { return self.extension().CopyBlocksBetween(from, to, block_bytes, move); }));
}

}  // namespace

void RegisterManagedCaches(ManagedClass &managed) {
  const auto no_keys = py::arg("keys") = KeyArguments();
  managed
      .def("register_cache", &RegisterCache, py::arg("layout"), py::arg("num_tensors"), py::arg("shape"),
           py::arg("data_type"), py::arg("placement"), py::arg("addrs"), no_keys,
           py::arg("remote_accessible") = true)
      .def(
          "unregister_cache",
          [](ManagedDataDist &self, int64_t cache_id) {
            return Report(WithoutGil([&] { return self.provider->UnregisterKvCache(cache_id); }));
          },
          py::arg("cache_id"))
      .def("allocate_cache", &AllocateCache, py::arg("layout"), py::arg("num_tensors"), py::arg("shape"),
           py::arg("data_type"), py::arg("placement"), no_keys)
      .def(
          "deallocate_cache",
          [](ManagedDataDist &self, int64_t cache_id) {
            return Report(WithoutGil([&] { return self.extension().DeallocateCache(cache_id); }));
          },
          py::arg("cache_id"))
      .def("remove_cache_key", &RemoveCacheKey, py::arg("key"))
      .def(
          "copy_row",
          [](ManagedDataDist &self, int64_t dst_cache_id, int64_t src_cache_id, uint32_t dst_row, uint32_t src_row,
             uint64_t offset, int64_t size) {
            const RowCopy copy{dst_cache_id, src_cache_id, dst_row, src_row, offset, size};
            return Report(WithoutGil([&] { return self.extension().CopyRow(copy); }));
          },
          py::arg("dst_cache_id"), py::arg("src_cache_id"), py::arg("dst_batch_index") = 0,
          py::arg("src_batch_index") = 0, py::arg("offset") = 0, py::arg("size") = -1)
      .def("copy_blocks", &CopyBlocks, py::arg("cache_id"), py::arg("src_blocks"), py::arg("dst_blocks"))
      .def("swap_blocks", &SwapBlocks, py::arg("src_cache_id"), py::arg("src_addrs"), py::arg("dst_cache_id"),
           py::arg("dst_addrs"), py::arg("block_bytes"), py::arg("src_blocks"), py::arg("dst_blocks"));
}

}  // namespace datadist::bindings
