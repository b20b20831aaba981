#include "channel/handoff_table.h"

#include <algorithm>

#include "base/log.h"
#include "base/random.h"
#include "base/text.h"

namespace datadist {
namespace {

Status CheckBlob(const HandoffTable::Blob &blob) {
  return blob.size() <= kMaxHandoffBlob ? Status::Ok()
                                        : Invalid("blob of " + std::to_string(blob.size()) + " bytes; allowed: " +
                                                  std::to_string(kMaxHandoffBlob));
}

// Adds what `mark` says to `known`; whether that was anything new. Reports of one rank may come twice, and out of order
// over two connections: what is final stays final until the blocks are others.
bool Advance(ProgressMark &known, const ProgressMark &mark) {
  if (mark.epoch != known.epoch) {
    if (mark.epoch < known.epoch) {
      return false;
    }
    known = mark;
    return true;
  }
  if (mark.base < known.base || mark.next < known.next) {
    return false;
  }
  if (mark.base > known.base || mark.next > known.next) {
    known = mark;
    return true;
  }
  bool grown = false;
  known.layers.resize(std::max(known.layers.size(), mark.layers.size()));
  for (size_t i = 0; i < mark.layers.size(); ++i) {
    grown = grown || (mark.layers[i] & ~known.layers[i]) != 0;
    known.layers[i] |= mark.layers[i];
  }
  return grown;
}

// A failure is the last that is said; within an epoch so is that all was written.
bool IsNewer(const Delivery &said, const Delivery &known) {
  if (known.state == DeliveryState::kFailed || said.epoch < known.epoch || said.state <= DeliveryState::kOffered) {
    return false;
  }
  return said.epoch > known.epoch || (said.bytes >= known.bytes && said.state >= known.state &&
                                      known.state != DeliveryState::kDone);
}

}  // namespace

Result<std::unique_ptr<HandoffTable>> HandoffTable::Create(size_t most) {
  const Result<HandoffKey> key = RandomBytes();
  if (!key.ok()) {
    return key.status();
  }
  return std::unique_ptr<HandoffTable>(new HandoffTable(key.value(), most));
}

void HandoffTable::SetListener(std::weak_ptr<HandoffListener> listener) {
  const std::lock_guard<std::mutex> lock(mutex_);
  listener_ = std::move(listener);
}

void HandoffTable::Notify(const std::vector<LeaseToken> &tokens) {
  std::unique_lock<std::mutex> lock(mutex_);
  const std::shared_ptr<HandoffListener> listener = listener_.lock();
  lock.unlock();
  if (listener != nullptr) {
    for (const LeaseToken &token : tokens) {
      listener->OnHandoffNews(token);
    }
  }
}

bool HandoffTable::Promise(const LeaseToken &token, std::string request_id) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (live_ >= most_ || !rows_.emplace(token, Row{std::move(request_id)}).second) {
      return false;
    }
    ++live_;
  }
  Notify({token});
  return true;
}

HandoffTable::Row *HandoffTable::FindUnsealedLocked(const LeaseToken &token) {
  const auto row = rows_.find(token);
  const bool found = row != rows_.end() && (row->second.state == HandoffState::kPromised ||
                                            row->second.state == HandoffState::kBegun);
  return found ? &row->second : nullptr;
}

bool HandoffTable::TellLocked(const LeaseToken &token, HandoffState state, uint32_t epoch, Blob blob) {
  Row *const row = FindUnsealedLocked(token);
  if (row == nullptr || (state == HandoffState::kSealed && row->withdrawn)) {
    return false;
  }
  sealed_ += state == HandoffState::kSealed ? 1 : 0;
  row->state = state;
  row->epoch = epoch;
  row->blob = std::move(blob);
  ++row->version;
  row->changed = ++row->stamp;
  return true;
}

Status HandoffTable::Begin(const LeaseToken &token, uint32_t epoch, Blob blob) {
  if (Status status = CheckBlob(blob); !status.ok()) {
    return status;
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!TellLocked(token, HandoffState::kBegun, epoch, std::move(blob))) {
      return Status::Ok();
    }
  }
  Notify({token});
  return Status::Ok();
}

Result<bool> HandoffTable::Seal(const LeaseToken &token, uint32_t epoch, Blob blob) {
  if (Status status = CheckBlob(blob); !status.ok()) {
    return status;
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!TellLocked(token, HandoffState::kSealed, epoch, std::move(blob))) {
      return false;
    }
  }
  Notify({token});
  return true;
}

void HandoffTable::EndLocked(Rows::iterator row, std::string_view reason) {
  Row &ended = row->second;
  sealed_ -= ended.state == HandoffState::kSealed ? 1 : 0;
  ended.state = HandoffState::kEnded;
  ended.reason = OneLine(reason);
  ended.blob = {};
  ended.marks.clear();
  ended.deliveries.clear();
  ended.request_id.clear();
  ++ended.version;
  ended.changed = ++ended.stamp;
  --live_;
  ended_.push_back(row->first);
  if (ended_.size() > kMostRemembered) {
    rows_.erase(ended_.front());
    ended_.pop_front();
  }
}

void HandoffTable::End(const LeaseToken &token, std::string_view reason) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto row = rows_.find(token);
    if (row == rows_.end() || row->second.state == HandoffState::kEnded) {
      return;
    }
    EndLocked(row, reason);
  }
  Notify({token});
}

void HandoffTable::EndUnsealed(std::string_view reason) {
  std::vector<LeaseToken> ended;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto &[token, row] : rows_) {
      if (row.state == HandoffState::kPromised || row.state == HandoffState::kBegun) {
        ended.push_back(token);
      }
    }
    for (const LeaseToken &token : ended) {
      EndLocked(rows_.find(token), reason);
    }
  }
  Notify(ended);
}

void HandoffTable::Forget(const std::vector<LeaseToken> &tokens) {
  std::vector<LeaseToken> forgotten;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const LeaseToken &token : tokens) {
      const auto row = rows_.find(token);
      if (row != rows_.end() && row->second.state == HandoffState::kSealed) {
        forgotten.push_back(token);
        EndLocked(row, "its lease has ended");
      }
    }
  }
  Notify(forgotten);
}

bool HandoffTable::IsWithdrawn(const LeaseToken &token) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto row = rows_.find(token);
  return row != rows_.end() && row->second.withdrawn;
}

bool HandoffTable::IsAwaited(const LeaseToken &token) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto row = rows_.find(token);
  return row != rows_.end() && row->second.awaited;
}

size_t HandoffTable::live() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return live_;
}

size_t HandoffTable::unsealed() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return live_ - sealed_;
}

bool HandoffTable::TakeMarkLocked(const RankId &rank, const LeaseToken &token, const ProgressMark &mark) {
  const auto found = rows_.find(token);
  if (found == rows_.end() || found->second.state == HandoffState::kEnded) {
    return false;
  }
  Row &row = found->second;
  const auto known = row.marks.find(rank);
  if (known != row.marks.end()) {
    if (!Advance(known->second.mark, mark)) {
      return false;
    }
    known->second.stamp = ++row.stamp;
    return true;
  }
  if (row.marks.size() >= kMostRanks) {
    return false;
  }
  row.marks.emplace(rank, RankMark{mark, ++row.stamp});
  return true;
}

void HandoffTable::Report(const RankId &rank, const std::vector<std::pair<LeaseToken, ProgressMark>> &marks) {
  std::vector<LeaseToken> moved;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto &[token, mark] : marks) {
      if (TakeMarkLocked(rank, token, mark)) {
        moved.push_back(token);
      }
    }
  }
  Notify(moved);
}

Result<bool> HandoffTable::Offer(const LeaseToken &token, const RankId &rank, uint64_t offer_id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Row *const row = FindUnsealedLocked(token);
  if (row == nullptr || row->withdrawn) {
    return Invalid("no hand-off that goes on has this token");
  }
  const auto known = row->deliveries.find({rank, offer_id});
  if (known != row->deliveries.end()) {
    return false;
  }
  if (row->deliveries.size() >= kMostRanks) {
    return Invalid("more than " + std::to_string(kMostRanks) + " offers for one hand-off");
  }
  row->deliveries.emplace(std::make_pair(rank, offer_id), RankDelivery{{DeliveryState::kOffered}, ++row->stamp});
  return true;
}

void HandoffTable::Deliver(const LeaseToken &token, const RankId &rank, uint64_t offer_id, Delivery delivery) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto row = rows_.find(token);
    if (row == rows_.end()) {
      return;
    }
    const auto known = row->second.deliveries.find({rank, offer_id});
    if (known == row->second.deliveries.end() || !IsNewer(delivery, known->second.delivery)) {
      return;
    }
    delivery.reason = OneLine(delivery.reason);
    known->second = RankDelivery{std::move(delivery), ++row->second.stamp};
  }
  Notify({token});
}

std::vector<LeaseToken> HandoffTable::Renewable(const std::vector<LeaseToken> &tokens) {
  std::vector<LeaseToken> found;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const LeaseToken &token : tokens) {
    if (Row *const row = FindUnsealedLocked(token)) {
      row->awaited = true;
      found.push_back(token);
    }
  }
  return found;
}

std::vector<LeaseToken> HandoffTable::Withdraw(const std::vector<LeaseToken> &tokens) {
  std::vector<LeaseToken> taken;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const LeaseToken &token : tokens) {
    if (Row *const row = FindUnsealedLocked(token)) {
      row->withdrawn = true;
      taken.push_back(token);
    }
  }
  return taken;
}

HandoffNews HandoffTable::Look(const LeaseToken &token, const std::optional<RankId> &rank, uint32_t seen_version,
                               uint64_t offer_id) {
  HandoffNews news;
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = rows_.find(token);
  if (found != rows_.end()) {
    Row &row = found->second;
    row.awaited = true;
    news.state = row.state;
    news.epoch = row.epoch;
    news.version = row.version;
    news.stamp = row.changed;
    news.reason = row.reason;
    const auto mark = rank.has_value() && offer_id == 0 ? row.marks.find(*rank) : row.marks.end();
    if (mark != row.marks.end()) {
      news.stamp = std::max(news.stamp, mark->second.stamp);
      news.mark = mark->second.mark;
    }
    const auto delivery = rank.has_value() ? row.deliveries.find({*rank, offer_id}) : row.deliveries.end();
    if (delivery != row.deliveries.end()) {
      news.stamp = std::max(news.stamp, delivery->second.stamp);
      news.delivery = delivery->second.delivery;
    }
    if (row.version != seen_version) {
      news.blob = row.blob;
    }
  }
  return news;
}

}  // namespace datadist
