// P's hand-offs: requests whose KV a D reads while P still prefills them. P's scheduler says what becomes of each, P's
// workers how far they are, and D asks for both.
//
//   Promise ──> promised ── Begin ──> begun ──┬── Seal ──> sealed ── Forget ──> (remembered as ended)
//                              └─ again ─┘    └── End ───> (remembered as ended)
//
// A lease is granted under the token before Seal, so a D that renews finds it in this table or among the leases, whichever
// it is that moment. Nobody is pushed anything: a listener learns that there is something to look at.
//
// Threads: any. No member waits for anything but another member.
#ifndef DATADIST_CHANNEL_HANDOFF_TABLE_H_
#define DATADIST_CHANNEL_HANDOFF_TABLE_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/status.h"
#include "channel/handoff.h"

namespace datadist {

class HandoffListener {
 public:
  virtual ~HandoffListener() = default;
  // On the thread that brought the news, which holds no lock of the table.
  virtual void OnHandoffNews(const LeaseToken &token) = 0;
};

class HandoffTable {
 public:
  using Blob = std::vector<uint8_t>;

  static constexpr size_t kMostLive = 65536;
  // Those that have ended and still say so: whoever comes too late comes soon.
  static constexpr size_t kMostRemembered = 4096;
  // Of one hand-off; more ranks than that no instance has.
  static constexpr size_t kMostRanks = 4096;

  // At most `most` that are promised, begun or sealed. LLM_FAILED without random bytes.
  static Result<std::unique_ptr<HandoffTable>> Create(size_t most = kMostLive);
  HandoffTable(const HandoffTable &) = delete;
  HandoffTable &operator=(const HandoffTable &) = delete;

  const HandoffKey &key() const { return key_; }
  // Told of news from now on, as long as it lives.
  void SetListener(std::weak_ptr<HandoffListener> listener);

  // The scheduler. False: the token is known, also as one that has ended, or there are too many.
  bool Promise(const LeaseToken &token, std::string request_id);
  // The blocks so far, from the first chunk on and whenever there are more, or others: `epoch` says which. Of a token that
  // is neither promised nor begun it changes nothing. LLM_PARAM_INVALID for a blob that no message has room for.
  Status Begin(const LeaseToken &token, uint32_t epoch, Blob blob);
  // Its lease has been granted. False: no D waits for it any more, or it has ended.
  Result<bool> Seal(const LeaseToken &token, uint32_t epoch, Blob blob);
  void End(const LeaseToken &token, std::string_view reason);
  // All that are no leases yet.
  void EndUnsealed(std::string_view reason);
  // Those whose leases have ended; of tokens that are not sealed it changes nothing.
  void Forget(const std::vector<LeaseToken> &tokens);
  bool IsWithdrawn(const LeaseToken &token) const;
  // Whether a D has asked for it.
  bool IsAwaited(const LeaseToken &token) const;
  // Promised, begun and sealed ones.
  size_t live() const;
  size_t unsealed() const;

  // The workers. What is older than what is known, or of no live token, is not taken.
  void Report(const RankId &rank, const std::vector<std::pair<LeaseToken, ProgressMark>> &marks);

  // A D would have that rank write into blocks of its. False: it has said so before. LLM_PARAM_INVALID for a hand-off of
  // which there will be nothing to write, or for which there are too many offers.
  Result<bool> Offer(const LeaseToken &token, const RankId &rank, uint64_t offer_id);
  // What is older than what is known, or was not offered, is not taken.
  void Deliver(const LeaseToken &token, const RankId &rank, uint64_t offer_id, Delivery delivery);

  // D's, by the server. Those of `tokens` that need no lease yet.
  std::vector<LeaseToken> Renewable(const std::vector<LeaseToken> &tokens);
  // Nobody needs those any more; returns those of `tokens` that were to become leases.
  std::vector<LeaseToken> Withdraw(const std::vector<LeaseToken> &tokens);
  // The blob only if it is not of `seen_version`. `rank`: whose mark, or with `offer_id` whose delivery by that offer,
  // and news of whom the stamp counts.
  HandoffNews Look(const LeaseToken &token, const std::optional<RankId> &rank, uint32_t seen_version,
                   uint64_t offer_id = 0);

 private:
  struct RankMark {
    ProgressMark mark;
    uint64_t stamp = 0;
  };
  struct RankDelivery {
    Delivery delivery;
    uint64_t stamp = 0;
  };
  struct Row {
    std::string request_id;
    HandoffState state = HandoffState::kPromised;
    uint32_t epoch = 0;
    uint32_t version = 0;
    uint64_t stamp = 1;    // counts all changes
    uint64_t changed = 1;  // the stamp of the last that is not a mark's
    Blob blob = {};
    std::string reason = {};
    std::map<RankId, RankMark> marks = {};
    std::map<std::pair<RankId, uint64_t>, RankDelivery> deliveries = {};
    bool withdrawn = false;
    bool awaited = false;
  };
  using Rows = std::map<LeaseToken, Row>;

  HandoffTable(const HandoffKey &key, size_t most) : key_(key), most_(most) {}
  Row *FindUnsealedLocked(const LeaseToken &token);
  bool TellLocked(const LeaseToken &token, HandoffState state, uint32_t epoch, Blob blob);
  bool TakeMarkLocked(const RankId &rank, const LeaseToken &token, const ProgressMark &mark);
  void EndLocked(Rows::iterator row, std::string_view reason);
  void Notify(const std::vector<LeaseToken> &tokens);

  const HandoffKey key_;
  const size_t most_;

  mutable std::mutex mutex_;  // guards all below
  Rows rows_;
  size_t live_ = 0;
  size_t sealed_ = 0;
  std::deque<LeaseToken> ended_;  // the oldest first
  std::weak_ptr<HandoffListener> listener_;
};

}  // namespace datadist

#endif  // DATADIST_CHANNEL_HANDOFF_TABLE_H_
