#include "channel/rank_geometries.h"

#include <string>
#include <utility>

#include "channel/messages.h"

namespace datadist {
namespace {

constexpr size_t kRanksNamed = 64;

std::string RankText(const RankId &rank) {
  return "(" + std::to_string(rank.pp_rank) + ", " + std::to_string(rank.tp_rank) + ")";
}

}  // namespace

Status RankGeometries::Set(Map geometries) {
  for (const auto &[rank, geometry] : geometries) {
    if (geometry.size() > kMaxGeometry) {
      return Invalid("geometry of worker " + RankText(rank) + " has " + std::to_string(geometry.size()) +
                     " bytes; allowed: " + std::to_string(kMaxGeometry));
    }
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  geometries_ = std::move(geometries);
  return Status::Ok();
}

Result<std::vector<uint8_t>> RankGeometries::Find(const RankId &rank) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Status known = CheckLocked(rank);
  return known.ok() ? Result<std::vector<uint8_t>>(geometries_.at(rank)) : known;
}

Status RankGeometries::Check(const RankId &rank) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return CheckLocked(rank);
}

Status RankGeometries::CheckLocked(const RankId &rank) const {
  if (geometries_.count(rank) != 0) {
    return Status::Ok();
  }
  std::string there;
  size_t named = 0;
  for (const auto &[each, geometry] : geometries_) {
    if (++named > kRanksNamed) {
      break;
    }
    there += (there.empty() ? "" : ", ") + RankText(each);
  }
  return Invalid("no worker (pp, tp) = " + RankText(rank) + "; there are [" + there + "]");
}

}  // namespace datadist
