// Shapes and data types as sizes in bytes.
#include <algorithm>
#include <optional>
#include <string>

#include "base/checked.h"
#include "memory/region_table.h"

namespace datadist {
namespace {

constexpr size_t kMaxDims = 31;

// Bits of one element; none for types whose elements have no size of their own.
std::optional<uint64_t> ElementBits(llm_datadist::DataType type) {
  using namespace ge;  // the header re-exports only the types that programs use
  switch (type) {
    case DT_UINT1:
      return 1;
    case DT_INT2:
    case DT_UINT2:
      return 2;
    case DT_INT4:
    case DT_FLOAT4_E2M1:
    case DT_FLOAT4_E1M2:
      return 4;
    case DT_FLOAT6_E3M2:
    case DT_FLOAT6_E2M3:
      return 6;
    case DT_INT8:
    case DT_UINT8:
    case DT_BOOL:
    case DT_DUAL_SUB_INT8:
    case DT_DUAL_SUB_UINT8:
    case DT_QINT8:
    case DT_QUINT8:
    case DT_HIFLOAT8:
    case DT_FLOAT8_E5M2:
    case DT_FLOAT8_E4M3FN:
    case DT_FLOAT8_E8M0:
      return 8;
    case DT_FLOAT16:
    case DT_BF16:
    case DT_INT16:
    case DT_UINT16:
    case DT_QINT16:
    case DT_QUINT16:
      return 16;
    case DT_FLOAT:
    case DT_INT32:
    case DT_UINT32:
    case DT_QINT32:
    case DT_COMPLEX32:
      return 32;
    case DT_DUAL:
      return 40;
    case DT_INT64:
    case DT_UINT64:
    case DT_DOUBLE:
    case DT_COMPLEX64:
      return 64;
    case DT_STRING:
    case DT_STRING_REF:
    case DT_COMPLEX128:
      return 128;
    case DT_RESOURCE:
    case DT_VARIANT:
    case DT_UNDEFINED:
      return std::nullopt;
  }
  return std::nullopt;  // a number that is no enumerator: data types arrive as integers
}

}  // namespace

bool ExtentsOverlap(std::vector<uint64_t> starts, uint64_t length) {
  std::sort(starts.begin(), starts.end());
  return std::adjacent_find(starts.begin(), starts.end(), [length](uint64_t before, uint64_t after) {
           return after - before < length;
         }) != starts.end();
}

Result<CacheGeometry> ComputeGeometry(const llm_datadist::CacheDesc &desc, CacheLayout layout) {
  if (desc.shape.empty() || desc.shape.size() > kMaxDims) {
    return Invalid("cache_desc.shape has " + std::to_string(desc.shape.size()) + " dimensions: allowed are 1.." +
                   std::to_string(kMaxDims));
  }
  uint64_t elements = 1;
  for (size_t i = 0; i < desc.shape.size(); ++i) {
    if (desc.shape[i] <= 0) {
      return Invalid("cache_desc.shape[" + std::to_string(i) + "] = " + std::to_string(desc.shape[i]) +
                     ": every dimension must be positive");
    }
    const auto product = CheckedMul(elements, static_cast<uint64_t>(desc.shape[i]));
    if (!product) {
      return Invalid("cache_desc.shape: the number of elements exceeds 64 bits");
    }
    elements = *product;
  }
  const auto element_bits = ElementBits(desc.data_type);
  if (!element_bits) {
    return Invalid("cache_desc.data_type " + std::to_string(static_cast<int>(desc.data_type)) +
                   " has no element size");
  }
  const auto bits = CheckedMul(elements, *element_bits);
  if (!bits) {
    return Invalid("cache_desc.shape: the size of a tensor exceeds 2^64 bits");
  }
  CacheGeometry geometry;
  geometry.placement = desc.placement;
  geometry.num_tensors = desc.num_tensors;
  const auto rows = static_cast<uint64_t>(desc.shape[0]);
  geometry.layout = layout;
  geometry.batch_size = layout == CacheLayout::kBlocks ? 1 : rows;
  geometry.num_blocks = layout == CacheLayout::kContiguous ? 0 : rows;
  geometry.tensor_bytes = *bits / 8 + (*bits % 8 != 0 ? 1 : 0);
  geometry.stride = geometry.tensor_bytes / rows;
  return geometry;
}

}  // namespace datadist
