// How the KV cache of each worker rank of an instance lies, as its scheduler has told: bytes that only Python reads.
//
// Threads: any.
#ifndef DATADIST_CHANNEL_RANK_GEOMETRIES_H_
#define DATADIST_CHANNEL_RANK_GEOMETRIES_H_

#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

#include "base/status.h"
#include "channel/handoff.h"

namespace datadist {

class RankGeometries {
 public:
  using Map = std::map<RankId, std::vector<uint8_t>>;

  // LLM_PARAM_INVALID for one that no message has room for.
  Status Set(Map geometries);
  // LLM_PARAM_INVALID names the ranks that there are.
  Result<std::vector<uint8_t>> Find(const RankId &rank) const;
  Status Check(const RankId &rank) const;

 private:
  Status CheckLocked(const RankId &rank) const;

  mutable std::mutex mutex_;
  Map geometries_;  // guarded by mutex_
};

}  // namespace datadist

#endif  // DATADIST_CHANNEL_RANK_GEOMETRIES_H_
