// How a transfer names bytes of a cache: some of its tensors, and the same stretches of each.
#ifndef DATADIST_MEMORY_SPANS_H_
#define DATADIST_MEMORY_SPANS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace datadist {

// Tensors [first, +count) of a cache.
struct TensorRange {
  uint32_t first = 0;
  uint32_t count = 0;
};

// Bytes [offset, offset + length) of each of some tensors.
struct Span {
  uint64_t offset = 0;
  uint64_t length = 0;
};

// `length` bytes at remote_offset of each remote tensor <-> local_offset of the local tensor paired with it.
struct Run {
  uint64_t remote_offset = 0;
  uint64_t local_offset = 0;
  uint64_t length = 0;
};

// Somebody's spans, or one side of somebody's runs, as spans: looked at where they are. Outlived by the list.
class SpanList {
 public:
  SpanList() = default;
  SpanList(const std::vector<Span> &spans) : spans_(&spans) {}  // NOLINT(google-explicit-constructor)
  SpanList(const std::vector<Run> &runs, uint64_t Run::*side) : runs_(&runs), side_(side) {}

  size_t size() const { return runs_ != nullptr ? runs_->size() : spans_ != nullptr ? spans_->size() : 0; }
  Span operator[](size_t index) const {
    return runs_ != nullptr ? Span{(*runs_)[index].*side_, (*runs_)[index].length} : (*spans_)[index];
  }

 private:
  const std::vector<Span> *spans_ = nullptr;
  const std::vector<Run> *runs_ = nullptr;
  uint64_t Run::*side_ = nullptr;
};

}  // namespace datadist

#endif  // DATADIST_MEMORY_SPANS_H_
