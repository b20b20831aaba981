#include "memory/write_grants.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/checked.h"

namespace datadist {
namespace {

bool Holds(const Ranges &ranges, const Span &span) {
  const auto after = std::upper_bound(ranges.begin(), ranges.end(), span.offset,
                                      [](uint64_t offset, const Range &range) { return offset < range.begin; });
  if (after == ranges.begin()) {
    return false;
  }
  const Range &range = *std::prev(after);
  return RangeFits(span.offset - range.begin, span.length, range.end - range.begin);
}

}  // namespace

// Tensors of which the same was granted, as layers of one cache are, share their ranges.
struct WriteGrants::Grant {
  struct Tensor {
    uint64_t address = 0;
    size_t set = 0;
  };

  uint64_t id = 0;
  uint64_t cluster_id = 0;
  std::vector<Tensor> tensors;  // by address
  std::vector<Ranges> sets;
  size_t uses = 0;  // guarded by WriteGrants::mutex_

  Grant(uint64_t cluster, std::vector<Area> areas) : cluster_id(cluster) {
    std::map<uint64_t, std::vector<size_t>> areas_of;
    for (size_t i = 0; i < areas.size(); ++i) {
      for (const uint64_t tensor : areas[i].tensors) {
        areas_of[tensor].push_back(i);
      }
    }
    std::map<std::vector<size_t>, size_t> set_of;
    for (const auto &[address, members] : areas_of) {
      const auto [entry, fresh] = set_of.emplace(members, sets.size());
      if (fresh) {
        sets.push_back(Union(areas, members));
      }
      tensors.push_back({address, entry->second});
    }
  }

  static Ranges Union(const std::vector<Area> &areas, const std::vector<size_t> &members) {
    std::vector<Range> all;
    for (const size_t member : members) {
      all.insert(all.end(), areas[member].ranges.begin(), areas[member].ranges.end());
    }
    return MakeRanges(std::move(all));
  }

  size_t parts() const {
    size_t count = tensors.size();
    for (const Ranges &set : sets) {
      count += set.size();
    }
    return count;
  }

  // Null where nothing of that tensor was granted.
  const Ranges *Of(uint64_t address) const {
    const auto found = std::lower_bound(tensors.begin(), tensors.end(), address,
                                        [](const Tensor &tensor, uint64_t wanted) { return tensor.address < wanted; });
    return found != tensors.end() && found->address == address ? &sets[found->set] : nullptr;
  }

  bool Holds(const std::vector<uint64_t> &wanted, const SpanList &spans) const {
    const Ranges *checked = nullptr;
    for (const uint64_t address : wanted) {
      const Ranges *const ranges = Of(address);
      if (ranges == nullptr) {
        return false;
      }
      if (ranges == checked) {
        continue;
      }
      for (size_t i = 0; i < spans.size(); ++i) {
        if (!datadist::Holds(*ranges, spans[i])) {
          return false;
        }
      }
      checked = ranges;
    }
    return true;
  }
};

WriteGrants::WriteGrants() = default;

WriteGrants::~WriteGrants() = default;

Result<uint64_t> WriteGrants::Add(uint64_t cluster_id, std::vector<Area> areas) {
  auto grant = std::make_unique<Grant>(cluster_id, std::move(areas));
  const size_t parts = grant->parts();
  const std::lock_guard<std::mutex> lock(mutex_);
  if (grants_.size() >= kMaxGrants) {
    return Invalid(std::to_string(grants_.size()) + " grants are alive: at most " + std::to_string(kMaxGrants) +
                   " are allowed");
  }
  if (!RangeFits(parts_, parts, kMaxParts)) {
    return Invalid("a grant of " + std::to_string(parts) + " tensors and ranges of them: " + std::to_string(parts_) +
                   " of " + std::to_string(kMaxParts) + " allowed in all grants together are taken");
  }
  grant->id = ++last_id_;
  of_cluster_[cluster_id].emplace(grant->id, grant.get());
  grants_.emplace(grant->id, std::move(grant));
  parts_ += parts;
  return last_id_;
}

Status WriteGrants::Revoke(uint64_t id) {
  std::unique_ptr<Grant> forgotten;  // destroyed after the lock is gone
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = grants_.find(id);
  if (found == grants_.end()) {
    return Status::Ok();
  }
  const Grant &grant = *found->second;
  if (const auto of = of_cluster_.find(grant.cluster_id); of != of_cluster_.end()) {
    of->second.erase(id);
    if (of->second.empty()) {
      of_cluster_.erase(of);
    }
  }
  if (grant.uses != 0) {
    return Status(llm_datadist::LLM_LINK_BUSY, "grant " + std::to_string(id) + ": cluster " +
                                                   std::to_string(grant.cluster_id) + " is still writing under it");
  }
  parts_ -= grant.parts();
  forgotten = std::move(found->second);
  grants_.erase(found);
  return Status::Ok();
}

// Taken by its first span, and held while the others are looked at without the lock: they may be many.
Result<WriteGrants::Use> WriteGrants::Take(uint64_t cluster_id, const std::vector<uint64_t> &tensors,
                                           const SpanList &spans) {
  uint64_t after = 0;
  while (!tensors.empty() && spans.size() != 0) {
    Use use(nullptr, Ender{this});
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      use = TakeNextLocked(cluster_id, after, tensors[0], spans[0]);
    }
    if (use == nullptr) {
      break;
    }
    if (use->Holds(tensors, spans)) {
      return use;
    }
    after = use->id;
  }
  const Span first = spans.size() != 0 ? spans[0] : Span{};
  return Invalid("cluster " + std::to_string(cluster_id) + " holds no live grant of all " +
                 std::to_string(spans.size()) + " spans, of which the first has " + std::to_string(first.length) +
                 " bytes at " + std::to_string(first.offset));
}

WriteGrants::Use WriteGrants::TakeNextLocked(uint64_t cluster_id, uint64_t after, uint64_t tensor, const Span &span) {
  const auto of = of_cluster_.find(cluster_id);
  if (of != of_cluster_.end()) {
    for (auto next = of->second.upper_bound(after); next != of->second.end(); ++next) {
      Grant &grant = *next->second;
      if (const Ranges *const ranges = grant.Of(tensor); ranges != nullptr && datadist::Holds(*ranges, span)) {
        ++grant.uses;
        return Use(&grant, Ender{this});
      }
    }
  }
  return Use(nullptr, Ender{this});
}

void WriteGrants::End(Grant &grant) {
  const std::lock_guard<std::mutex> lock(mutex_);
  --grant.uses;
}

}  // namespace datadist
