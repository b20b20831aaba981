// A worker of P tells its instance how far it is with the requests whose KV is handed off while they are prefilled.
//
//   BeginStep ── Layer, Layer, … ── EndStep ── BeginStep …      vLLM's thread
//        └──────────── what is newest ────────────┴──> REPORT   a thread of its own, one unanswered at most
//
// D reads what is reported, so that is only what the device has written. What P's scheduler has not heard in time is told
// again, as it is then.
//
// Threads: any. No member but Close waits for anything but another member. After fork() the child may only destroy it.
#ifndef DATADIST_CHANNEL_PROGRESS_REPORTER_H_
#define DATADIST_CHANNEL_PROGRESS_REPORTER_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "channel/handoff.h"
#include "control/key_ring.h"

namespace datadist {

struct ReporterLimits {
  size_t entries = 1U << 16U;
  std::chrono::milliseconds answer{2'000};   // until a REPORT is told again
  std::chrono::milliseconds pause{100};      // after one that was refused
  std::chrono::milliseconds give_up{10'000};  // nobody has answered for so long: what there is to tell is dropped
};

class ProgressReporter {
 public:
  struct Endpoint {
    std::string ip;  // a literal
    uint16_t port = 0;
  };
  // A step computes the tokens [before, after) of that request.
  struct Entry {
    LeaseToken token{};
    uint32_t epoch = 0;
    uint32_t before = 0;
    uint32_t after = 0;
  };

  // LLM_FAILED when the system refuses a thread or an eventfd.
  static Result<std::unique_ptr<ProgressReporter>> Create(uint16_t content_version, const RankId &rank,
                                                          const Trust &trust, const ReporterLimits &limits = {});
  ~ProgressReporter();  // Close
  ProgressReporter(const ProgressReporter &) = delete;
  ProgressReporter &operator=(const ProgressReporter &) = delete;

  // LLM_PARAM_INVALID for an entry that goes backwards. A step before it that was not ended is not taken as done.
  Status BeginStep(const Endpoint &endpoint, const HandoffKey &key, const std::vector<Entry> &entries);
  // Of every entry of the step that layer has been written. One beyond what a mark has room for is not told of.
  void Layer(size_t index);
  // All layers have.
  void EndStep();
  // Of which there is something to tell, or more will be.
  size_t size() const;

  // What was not told stays so. Idempotent.
  void Close();
  bool in_forked_child() const;

 private:
  class State;
  explicit ProgressReporter(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace datadist

#endif  // DATADIST_CHANNEL_PROGRESS_REPORTER_H_
