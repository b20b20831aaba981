// What a peer may do with our caches, and which of them are granted to it for writing.
#include <algorithm>
#include <string>
#include <utility>

#include "base/checked.h"
#include "llm_datadist/llm_datadist_ext.h"
#include "memory/region_table.h"

namespace datadist {
namespace {

enum class Verdict : uint8_t { kNo, kGranted, kYes };

bool WrittenByGrant(PeerAccess access) {
  return access == PeerAccess::kGranted || access == PeerAccess::kReadGranted;
}

bool Reads(PeerAccess access) {
  return access == PeerAccess::kRead || access == PeerAccess::kReadWrite || access == PeerAccess::kReadGranted;
}

Verdict JudgeWrite(PeerAccess access) {
  return access == PeerAccess::kReadWrite ? Verdict::kYes : WrittenByGrant(access) ? Verdict::kGranted : Verdict::kNo;
}

Verdict Judge(PeerAccess access, PeerUse use) {
  switch (use) {
    case PeerUse::kDescribe:
      return access == PeerAccess::kNone ? Verdict::kNo : Verdict::kYes;
    case PeerUse::kRead:
      return Reads(access) ? Verdict::kYes : Verdict::kNo;
    case PeerUse::kDigest:
      return Reads(access) ? Verdict::kYes : JudgeWrite(access);
    case PeerUse::kWrite:
      return JudgeWrite(access);
  }
  return Verdict::kNo;
}

const char *NameOf(PeerUse use) {
  switch (use) {
    case PeerUse::kDescribe:
      return "know of";
    case PeerUse::kRead:
    case PeerUse::kDigest:
      return "read";
    case PeerUse::kWrite:
      return "write into";
  }
  return "use";
}

// Blocks next to each other as one range each, in the order in which they are given.
Result<std::vector<Range>> RangesOf(const std::vector<uint64_t> &blocks, const CacheGeometry &geometry,
                                    const std::string &field) {
  std::vector<Range> ranges;
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (blocks[i] >= geometry.num_blocks) {
      return Invalid(field + "[" + std::to_string(i) + "]: " + std::to_string(blocks[i]) + ", allowed: 0.." +
                     std::to_string(geometry.num_blocks - 1));
    }
    const uint64_t begin = blocks[i] * geometry.stride;
    if (!ranges.empty() && ranges.back().end == begin) {
      ranges.back().end += geometry.stride;
    } else {
      ranges.push_back({begin, begin + geometry.stride});
    }
  }
  return ranges;
}

}  // namespace

Status RegionTable::CheckPeerUse(PeerUse use) const {
  return Judge(limits_.peer_access, use) != Verdict::kNo
             ? Status::Ok()
             : Invalid(std::string("peers may not ") + NameOf(use) + " the caches of this endpoint (option " +
                       llm_datadist::OPTION_PEER_ACCESS + ")");
}

Status RegionTable::CheckPeerRequest(const RegisteredCache &cache, const PeerRequest &request) const {
  if (Status status = CheckPeerUse(request.use); !status.ok()) {
    return status;
  }
  const CacheRights &rights = cache.rights();
  const auto &whose = rights.clusters;
  if (!whose.empty() && std::find(whose.begin(), whose.end(), request.cluster_id) == whose.end()) {
    return Invalid("cache " + std::to_string(cache.id()) + " is not for cluster " +
                   std::to_string(request.cluster_id));
  }
  return Judge(rights.access, request.use) != Verdict::kNo
             ? Status::Ok()
             : Invalid("peers may not " + std::string(NameOf(request.use)) + " cache " + std::to_string(cache.id()));
}

bool RegionTable::PeersMayRead(const RegisteredCache &cache) const {
  return Reads(limits_.peer_access) && Reads(cache.rights().access);
}

bool RegionTable::NeedsGrant(const RegisteredCache &cache, PeerUse use) const {
  return Judge(limits_.peer_access, use) == Verdict::kGranted || Judge(cache.rights().access, use) == Verdict::kGranted;
}

Result<CachePin> RegionTable::PinForPeer(int64_t cache_id, uint64_t generation, const PeerRequest &request) {
  if (Status status = CheckPeerUse(request.use); !status.ok()) {
    return status;
  }
  Result<CachePin> pin = Pin(cache_id);
  if (!pin.ok()) {
    return pin;
  }
  const RegisteredCache &cache = pin.value().cache();
  if (cache.generation() != generation) {
    return Status(llm_datadist::LLM_KV_CACHE_NOT_EXIST,
                  "cache " + std::to_string(cache_id) + " was registered anew");
  }
  if (Status status = CheckPeerRequest(cache, request); !status.ok()) {
    return status;
  }
  if (!NeedsGrant(cache, request.use)) {
    return pin;
  }
  const TensorRange &tensors = request.tensors;
  if (!RangeFits(tensors.first, tensors.count, cache.addrs().size())) {
    return Invalid("tensors from " + std::to_string(tensors.first) + ", " + std::to_string(tensors.count) +
                   " of them, of cache " + std::to_string(cache_id) + ": it has " +
                   std::to_string(cache.addrs().size()));
  }
  const auto first = cache.addrs().begin() + tensors.first;
  Result<WriteGrants::Use> use = grants_.Take(request.cluster_id, {first, first + tensors.count}, request.spans);
  if (!use.ok()) {
    return Invalid("peers may " + std::string(NameOf(request.use)) + " cache " + std::to_string(cache_id) +
                   " only where they were granted to write: " + use.status().text());
  }
  pin.value().grant_ = std::move(use).value();
  return pin;
}

Result<WriteGrants::Area> RegionTable::AreaOf(uint64_t cluster_id, const WritableBlocks &blocks) {
  const Result<CachePin> pin = Pin(blocks.cache_id);
  if (!pin.ok()) {
    return pin.status();
  }
  const RegisteredCache &cache = pin.value().cache();
  const std::string field = "blocks of cache " + std::to_string(blocks.cache_id);
  if (Status status = CheckPeerRequest(cache, {cluster_id, PeerUse::kWrite}); !status.ok()) {
    return status;
  }
  if (!NeedsGrant(cache, PeerUse::kWrite)) {
    return Invalid(field + ": peers do not write there by grant (option " +
                   std::string(llm_datadist::OPTION_PEER_ACCESS) + ", allowed: 'granted', 'read_granted')");
  }
  if (blocks.blocks.empty() || cache.geometry().num_blocks == 0) {
    return Invalid(field + (blocks.blocks.empty() ? ": empty" : ": it has no blocks"));
  }
  Result<std::vector<Range>> ranges = RangesOf(blocks.blocks, cache.geometry(), field);
  if (!ranges.ok()) {
    return ranges.status();
  }
  return WriteGrants::Area{cache.addrs(), std::move(ranges).value()};
}

Result<uint64_t> RegionTable::GrantWrites(uint64_t cluster_id, const std::vector<WritableBlocks> &blocks) {
  if (blocks.empty()) {
    return Invalid("blocks: empty, allowed: those of one cache or more");
  }
  std::vector<WriteGrants::Area> areas;
  for (const WritableBlocks &of_cache : blocks) {
    Result<WriteGrants::Area> area = AreaOf(cluster_id, of_cache);
    if (!area.ok()) {
      return Status(area.status().code(), "blocks[" + std::to_string(areas.size()) + "]: " + area.status().text());
    }
    areas.push_back(std::move(area).value());
  }
  return grants_.Add(cluster_id, std::move(areas));
}

}  // namespace datadist
