// The initiator's end of a link in transport tests.
#ifndef DATADIST_TESTS_TRANSPORT_SUPPORT_INITIATOR_H_
#define DATADIST_TESTS_TRANSPORT_SUPPORT_INITIATOR_H_

#include <chrono>
#include <memory>
#include <vector>

#include "transport_support/owner.h"

namespace datadist::test {

// A registered and pinned cache of the initiator.
class LocalCache {
 public:
  LocalCache(const CacheShape &shape, uint64_t seed);
  const CachePin &pin() const { return pin_; }
  void Fill(const std::vector<uint8_t> &bytes) { arena_.Fill(bytes); }
  std::vector<uint8_t> Bytes() const { return arena_.Bytes(); }
  bool CanariesIntact() const { return arena_.CanariesIntact(); }

 private:
  Arena arena_;
  std::shared_ptr<RegionTable> regions_ = RegionTable::Create({});
  CachePin pin_;
};

// The control connection of a link, as far as a transport needs it.
class CallsTo final : public PeerCalls {
 public:
  explicit CallsTo(const std::unique_ptr<Owner> &owner) : owner_(owner) {}
  Status AskToRead(const TransferOp &op, Deadline deadline) override {
    ++asked;
    return owner_->Read(RequestOf(op, deadline));
  }
  static PushRequest RequestOf(const TransferOp &op, Deadline deadline);

  int asked = 0;

 private:
  const std::unique_ptr<Owner> &owner_;
};

std::unique_ptr<DataPath> ConnectCma(Owner &owner, PeerCalls *calls, std::shared_ptr<WorkerPool> pool);
std::unique_ptr<DataPath> ConnectTcp(Owner &owner, size_t streams, std::shared_ptr<WorkerPool> pool,
                                     std::chrono::milliseconds max_request);

}  // namespace datadist::test

#endif  // DATADIST_TESTS_TRANSPORT_SUPPORT_INITIATOR_H_
