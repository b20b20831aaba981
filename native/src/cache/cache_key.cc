#include "cache/cache_key.h"

namespace datadist {

std::string Text(const CacheKey &key) {
  const std::string model = " of model " + std::to_string(key.model_id);
  switch (key.kind) {
    case KeyKind::kRequest:
      return "key request " + std::to_string(key.id) + model;
    case KeyKind::kPrefix:
      return "key prefix " + std::to_string(key.id) + model;
    case KeyKind::kBlocks:
      return "key blocks" + model;
  }
  return "key of unknown kind " + std::to_string(static_cast<int>(key.kind));
}

std::string Text(const CacheRef &ref) {
  switch (ref.by) {
    case CacheRef::By::kId:
      return "cache " + std::to_string(ref.cache_id);
    case CacheRef::By::kKey:
      return Text(ref.key);
    case CacheRef::By::kAddress:
      return std::to_string(ref.length) + " bytes at address " + std::to_string(ref.address);
  }
  return "cache named in unknown way " + std::to_string(static_cast<int>(ref.by));
}

}  // namespace datadist
