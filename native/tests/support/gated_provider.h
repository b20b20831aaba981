// A provider whose transfers block until the test lets them go.
#ifndef DATADIST_TESTS_SUPPORT_GATED_PROVIDER_H_
#define DATADIST_TESTS_SUPPORT_GATED_PROVIDER_H_

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "provider/provider.h"

namespace datadist::testing {

// Each transfer announces itself and then blocks until its gate opens. The first source block is the transfer's label.
class GatedProvider : public Provider {
 public:
  // `enter`: what each thread is told that enters.
  explicit GatedProvider(bool gated, Status enter = Status::Ok()) : gated_(gated), enter_(std::move(enter)) {}

  Capabilities capabilities() const override { return {}; }
  Status EnterThread() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    entered_.insert(std::this_thread::get_id());
    return enter_;
  }
  Status Initialize(const Options &) override { return Status::Ok(); }
  void Finalize() override {}
  Status SetRole(llm_datadist::LlmRole, const Options &) override { return Status::Ok(); }
  Status Link(const std::vector<llm_datadist::ClusterInfo> &clusters, std::vector<llm_datadist::Status> &rets,
              int32_t timeout_ms) override {
    rets.assign(clusters.size(), llm_datadist::LLM_LINK_FAILED);
    return Status(llm_datadist::LLM_LINK_FAILED, "link of " + std::to_string(clusters.at(0).remote_cluster_id) +
                                                     " within " + std::to_string(timeout_ms));
  }
  Status Unlink(const std::vector<llm_datadist::ClusterInfo> &, std::vector<llm_datadist::Status> &, int32_t,
                bool force) override {
    return force ? Status::Ok() : Status(llm_datadist::LLM_UNLINK_FAILED, "not forced");
  }
  Result<int64_t> RegisterKvCache(const llm_datadist::CacheDesc &, const std::vector<uint64_t> &) override {
    return int64_t{1};
  }
  Status UnregisterKvCache(int64_t) override { return Status::Ok(); }
  Status PullKvBlocks(const BlocksTransfer &transfer) override { return Run(transfer); }
  Status PushKvBlocks(const BlocksTransfer &transfer) override { return Run(transfer); }
  Status PullKvCache(const CacheTransfer &) override { return Status::Ok(); }
  Status PushKvCache(const CacheTransfer &) override { return Status::Ok(); }
  Result<uint16_t> ListenPort() override { return Status(llm_datadist::LLM_FEATURE_NOT_ENABLED, "no listener"); }
  Result<llm_datadist::LinkReport> QueryLink(uint64_t) override {
    return Status(llm_datadist::LLM_NOT_YET_LINK, "no link");
  }
  Result<llm_datadist::HugePagesReport> WaitForHugePages() override { return llm_datadist::HugePagesReport(); }

  void AwaitStarted(const std::set<uint64_t> &labels) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return std::includes(started_.begin(), started_.end(), labels.begin(), labels.end()); });
  }
  void Open(uint64_t label) {
    const std::lock_guard<std::mutex> lock(mutex_);
    opened_.insert(label);
    changed_.notify_all();
  }
  std::vector<uint64_t> order() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return order_;
  }
  bool stranger_called() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return stranger_called_;
  }
  bool lane_violated() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return lane_violated_;
  }

 private:
  Status Run(const BlocksTransfer &transfer) {
    const uint64_t label = transfer.src_blocks.at(0);
    const uint64_t cluster = transfer.remote.cluster_id;
    std::unique_lock<std::mutex> lock(mutex_);
    lane_violated_ |= ++running_[cluster] > 1;
    stranger_called_ |= entered_.count(std::this_thread::get_id()) == 0;
    started_.insert(label);
    order_.push_back(label);
    changed_.notify_all();
    changed_.wait(lock, [&] { return !gated_ || opened_.count(label) > 0; });
    --running_[cluster];
    return Status::Ok();
  }

  const bool gated_;
  const Status enter_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::set<uint64_t> started_;
  std::set<uint64_t> opened_;
  std::map<uint64_t, int> running_;
  std::vector<uint64_t> order_;
  bool lane_violated_ = false;
  std::set<std::thread::id> entered_;
  bool stranger_called_ = false;
};

}  // namespace datadist::testing

#endif  // DATADIST_TESTS_SUPPORT_GATED_PROVIDER_H_
