// Copies between caches of this process, which no link is needed for.
#include <cstring>
#include <string>

#include "base/checked.h"
#include "engine/engine.h"

namespace datadist {
namespace {

// The runs for each of the tensors; both pins hold all of them.
Status CopyRuns(const CachePin &src, const CachePin &dst, const std::vector<ByteRun> &runs) {
  for (uint64_t tensor = 0; tensor < src.cache().geometry().num_tensors; ++tensor) {
    for (const ByteRun &run : runs) {
      const Result<std::byte *> from = src.Resolve(tensor, run.src_offset, run.length);
      const Result<std::byte *> to = dst.Resolve(tensor, run.dst_offset, run.length);
      if (!from.ok() || !to.ok()) {
        return from.ok() ? to.status() : from.status();
      }
      std::memmove(to.value(), from.value(), run.length);
    }
  }
  return Status::Ok();
}

// One side of CopyBlocksBetween: pinned, or the caller's addresses.
struct BlockSide {
  CachePin pin;
  const std::vector<uint64_t> *addrs = nullptr;

  size_t tensors() const { return pin ? pin.cache().geometry().num_tensors : addrs->size(); }
  Result<std::byte *> Resolve(size_t tensor, uint64_t offset, uint64_t length) const {
    if (pin) {
      return pin.Resolve(tensor, offset, length);
    }
    if ((*addrs)[tensor] == 0 || !CheckedAdd((*addrs)[tensor], offset).has_value()) {
      return Invalid("addrs[" + std::to_string(tensor) + "] = " + std::to_string((*addrs)[tensor]) +
                     " is no address of a tensor");
    }
    return reinterpret_cast<std::byte *>(static_cast<uintptr_t>((*addrs)[tensor] + offset));
  }
};

// Of a registered cache, or of memory as the caller describes it.
Result<CacheGeometry> GeometryOf(CacheRegistry &caches, const llm_datadist::Cache &cache) {
  if (cache.cache_id > 0) {
    const Result<CachePin> pin = caches.Pin(cache.cache_id);
    return pin.ok() ? Result<CacheGeometry>(pin.value().cache().geometry()) : pin.status();
  }
  Result<CacheGeometry> geometry = ComputeGeometry(cache.cache_desc);
  if (geometry.ok() && cache.tensor_addrs.size() != geometry.value().num_tensors) {
    return Invalid("tensor_addrs has " + std::to_string(cache.tensor_addrs.size()) +
                   " entries, cache_desc.num_tensors is " + std::to_string(geometry.value().num_tensors));
  }
  return geometry;
}

CopySide SideOf(const llm_datadist::Cache &cache) {
  return {cache.cache_id, {cache.tensor_addrs.begin(), cache.tensor_addrs.end()}};
}

Status CheckSide(const char *name, const BlockSide &side, uint64_t block_bytes) {
  if (side.pin && side.pin.cache().geometry().stride != block_bytes) {
    return Invalid(std::string(name) + " cache: its blocks have " +
                   std::to_string(side.pin.cache().geometry().stride) + " bytes, not " + std::to_string(block_bytes));
  }
  return Status::Ok();
}

}  // namespace

Status Engine::CopyRow(const RowCopy &copy) {
  if (Status status = CheckRowSize(copy.size); !status.ok()) {
    return status;
  }
  const Result<CachePin> src = endpoint_->caches()->Pin(copy.src_cache_id);
  if (!src.ok()) {
    return src.status();
  }
  const Result<CachePin> dst = endpoint_->caches()->Pin(copy.dst_cache_id);
  if (!dst.ok()) {
    return dst.status();
  }
  const CacheGeometry &from = src.value().cache().geometry();
  const CacheGeometry &to = dst.value().cache().geometry();
  if (from.num_tensors != to.num_tensors) {
    return Invalid("the source cache has " + std::to_string(from.num_tensors) + " tensors, the destination cache " +
                   std::to_string(to.num_tensors));
  }
  const RowMove move{copy.src_row, copy.dst_row, copy.size, copy.offset, copy.offset};
  const Result<std::vector<ByteRun>> runs = BuildRuns(move, from, to, LocalSide::kSource, true);
  return runs.ok() ? CopyRuns(src.value(), dst.value(), runs.value()) : runs.status();
}

Status Engine::CopyBlocks(int64_t cache_id, const BlockMove &move) {
  const Result<CachePin> cache = endpoint_->caches()->Pin(cache_id);
  if (!cache.ok()) {
    return cache.status();
  }
  const CacheGeometry &geometry = cache.value().cache().geometry();
  for (const Status &status : {CheckBlockLists(move.src_blocks, move.dst_blocks), CheckSource(move, geometry),
                               CheckDestination(move, geometry)}) {
    if (!status.ok()) {
      return status;
    }
  }
  // Block by block: a source may be the destination of an earlier pair, so that runs would read it too early.
  for (size_t i = 0; i < move.src_blocks.size(); ++i) {
    const std::vector<ByteRun> run = {
        {move.src_blocks[i] * geometry.stride, move.dst_blocks[i] * geometry.stride, geometry.stride}};
    if (Status status = CopyRuns(cache.value(), cache.value(), run); !status.ok()) {
      return status;
    }
  }
  return Status::Ok();
}

Status Engine::CopyKvBlocks(const llm_datadist::Cache &src, const llm_datadist::Cache &dst,
                            const std::vector<uint64_t> &src_blocks,
                            const std::vector<std::vector<uint64_t>> &dst_lists) {
  const Result<CacheGeometry> from = GeometryOf(*endpoint_->caches(), src);
  if (!from.ok()) {
    return Status(from.status().code(), "src_cache: " + from.status().text());
  }
  const Result<CacheGeometry> to = GeometryOf(*endpoint_->caches(), dst);
  if (!to.ok()) {
    return Status(to.status().code(), "dst_cache: " + to.status().text());
  }
  if (dst_lists.empty()) {
    return Invalid("dst_blocks_list is empty: at least one list of blocks is needed");
  }
  for (const std::vector<uint64_t> &dst_blocks : dst_lists) {
    for (const Status &status :
         {CheckBlockLists(src_blocks, dst_blocks), CheckBlockIndices("src_blocks", src_blocks, from.value()),
          CheckBlockIndices("dst_blocks", dst_blocks, to.value())}) {
      if (!status.ok()) {
        return status;
      }
    }
  }
  if (from.value().stride != to.value().stride) {
    return Invalid("a block of src_cache has " + std::to_string(from.value().stride) + " bytes, one of dst_cache " +
                   std::to_string(to.value().stride));
  }
  for (const std::vector<uint64_t> &dst_blocks : dst_lists) {
    const BlockMove move{src_blocks, dst_blocks};
    if (Status status = CopyBlocksBetween(SideOf(src), SideOf(dst), from.value().stride, move); !status.ok()) {
      return status;
    }
  }
  return Status::Ok();
}

Status Engine::CopyBlocksBetween(const CopySide &src, const CopySide &dst, uint64_t block_bytes,
                                 const BlockMove &move) {
  BlockSide sides[2];
  const CopySide *const caches[2] = {&src, &dst};
  for (size_t i = 0; i < 2; ++i) {
    sides[i].addrs = &caches[i]->addrs;
    if (caches[i]->cache_id > 0) {
      Result<CachePin> pin = endpoint_->caches()->Pin(caches[i]->cache_id);
      if (!pin.ok()) {
        return pin.status();
      }
      sides[i].pin = std::move(pin).value();
    }
  }
  for (const Status &status : {CheckBlockLists(move.src_blocks, move.dst_blocks),
                               CheckSide("src", sides[0], block_bytes), CheckSide("dst", sides[1], block_bytes)}) {
    if (!status.ok()) {
      return status;
    }
  }
  if (sides[0].tensors() != sides[1].tensors() || block_bytes == 0) {
    return Invalid("src cache has " + std::to_string(sides[0].tensors()) + " tensors, dst cache " +
                   std::to_string(sides[1].tensors()) + ", blocks of " + std::to_string(block_bytes) + " bytes");
  }
  for (size_t tensor = 0; tensor < sides[0].tensors(); ++tensor) {
    for (size_t i = 0; i < move.src_blocks.size(); ++i) {
      const auto from_offset = CheckedMul(move.src_blocks[i], block_bytes);
      const auto to_offset = CheckedMul(move.dst_blocks[i], block_bytes);
      if (!from_offset.has_value() || !to_offset.has_value()) {
        return Invalid("src_blocks[" + std::to_string(i) + "] or dst_blocks[" + std::to_string(i) +
                       "] exceeds 64 bits");
      }
      const Result<std::byte *> from = sides[0].Resolve(tensor, *from_offset, block_bytes);
      const Result<std::byte *> to = sides[1].Resolve(tensor, *to_offset, block_bytes);
      if (!from.ok() || !to.ok()) {
        return from.ok() ? to.status() : from.status();
      }
      std::memmove(to.value(), from.value(), block_bytes);
    }
  }
  return Status::Ok();
}

}  // namespace datadist
