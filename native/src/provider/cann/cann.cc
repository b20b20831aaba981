#include "provider/cann/cann.h"

#include <algorithm>
#include <atomic>
#include <charconv>
#include <exception>
#include <functional>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "base/log.h"
#include "base/process_epoch.h"
#include "provider/cann/call_gate.h"
#include "provider/cann/convert.h"
#include "provider/cann/listen_port.h"
#include "provider/cann/loader.h"
#include "provider/cann/status.h"
#include "transfer/plan.h"

namespace datadist::cann {
namespace {

using namespace llm_datadist;  // the codes and options
using datadist::Status;
using std::chrono::milliseconds;

constexpr uint32_t kMaxAddrsPerCache = 240;
constexpr uint32_t kMaxRegions = 256;
constexpr uint32_t kMaxLinks = 512;
// With TLS; 200 ms without.
constexpr int32_t kMinLinkTimeoutMs = 2000;
// Each run is an operation of the device's: below that its cost is that of the operation, not of the bytes.
constexpr uint32_t kMinRunBytes = 4096;
constexpr milliseconds kDefaultTransferTimeout{1000};
// That a call may take beyond its own timeout.
constexpr milliseconds kGrace{10000};
constexpr int32_t kNoDevice = -1;

Result<int32_t> ParseNumber(const char *option, const std::string &text) {
  int32_t number = 0;
  const char *const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc() || rest != end || number < 0) {
    return Invalid(std::string(option) + " is '" + text + "': a number from 0 on");
  }
  return number;
}

class CannProvider final : public Provider {
 public:
  CannProvider(const Library &library, uint64_t cluster_id, LlmRole role)
      : library_(library), calls_(library.calls), object_(new Object) {
    calls_.construct(object_, cluster_id, static_cast<int32_t>(role));
  }
  ~CannProvider() override {
    Finalize();
    if (!abandoned_ && epoch_ == ProcessEpoch()) {
      calls_.destroy(object_);
      delete object_;
    }
  }

  Capabilities capabilities() const override {
    Capabilities cann;
    cann.engine_options = false;
    cann.reports_links = false;
    cann.ipv6 = false;
    cann.register_before_link = true;
    cann.writes_end_with_call = false;
    cann.grants_writes = false;
    cann.peer_drops_half = false;
    cann.crossing_links = false;
    cann.max_addrs_per_cache = kMaxAddrsPerCache;
    cann.max_regions = kMaxRegions;
    cann.max_links = kMaxLinks;
    cann.min_run_bytes = kMinRunBytes;
    cann.min_link_timeout_ms = kMinLinkTimeoutMs;
    return cann;
  }

  Status EnterThread() override {
    const int32_t device = device_;
    return Tell("EnterThread", device == kNoDevice ? NotInitialized() : library_.device.Enter(device));
  }

  Status Initialize(const Options &given) override {
    return Guarded("Initialize", [&] { return Start(ForTheLibrary(given)); });
  }

  // Waits for the calls that run: the library does not. One that outlives its own timeout would be in freed memory.
  void Finalize() override {
    if (epoch_ != ProcessEpoch()) {
      return;
    }
    const std::lock_guard<std::mutex> lock(start_mutex_);
    if (!started_) {
      return;
    }
    started_ = false;
    if (!gate_.Close(milliseconds(longest_call_ms_) + kGrace)) {
      abandoned_ = true;
      Log(LogLevel::kError, "Finalize: a call of CANN's has not ended long after its timeout; its endpoint is left");
      return;
    }
    if (Status entered = EnterThread(); !entered.ok()) {
      Log(LogLevel::kWarning, "Finalize: " + entered.text());
    }
    calls_.finalize(object_);
    device_ = kNoDevice;
    listen_port_ = 0;
    const std::lock_guard<std::mutex> caches_lock(caches_mutex_);
    caches_.clear();
  }

  Status SetRole(LlmRole role, const Options &options) override {
    return Call("SetRole", [&] {
      return Listening(ForTheLibrary(options), [&](const Options &with_port) {
        const Code code =
            calls_.set_role(object_, static_cast<int32_t>(role), ToCann(calls_.strings, with_port));
        return Explain(CallKind::kOther, code);
      });
    });
  }

  Status Link(const std::vector<llm_datadist::ClusterInfo> &clusters, std::vector<llm_datadist::Status> &rets,
              int32_t timeout_ms) override {
    return ForClusters("LinkLlmClusters", clusters, rets, timeout_ms, [&](const auto &infos, std::vector<Code> &codes) {
      return calls_.link(object_, infos, codes, timeout_ms);
    });
  }
  Status Unlink(const std::vector<llm_datadist::ClusterInfo> &clusters, std::vector<llm_datadist::Status> &rets,
                int32_t timeout_ms, bool force) override {
    return ForClusters("UnlinkLlmClusters", clusters, rets, timeout_ms,
                       [&](const auto &infos, std::vector<Code> &codes) {
                         return calls_.unlink(object_, infos, codes, timeout_ms, force);
                       });
  }

  Result<int64_t> RegisterKvCache(const llm_datadist::CacheDesc &desc, const std::vector<uint64_t> &addrs) override {
    return Call("RegisterKvCache", [&]() -> Result<int64_t> {
      if (addrs.size() > kMaxAddrsPerCache) {
        return Invalid("addrs has " + std::to_string(addrs.size()) + " addresses, CANN takes at most " +
                       std::to_string(kMaxAddrsPerCache) + " per cache");
      }
      int64_t cache_id = 0;
      const Code code = calls_.register_cache(object_, ToCann(desc), addrs, {}, cache_id);
      const std::lock_guard<std::mutex> lock(caches_mutex_);
      if (code != LLM_SUCCESS) {
        return Explain(CallKind::kOther, code, RegistrationText(addrs.size()));
      }
      caches_[cache_id] = desc.num_tensors;
      return cache_id;
    });
  }
  Status UnregisterKvCache(int64_t cache_id) override {
    return Call("UnregisterKvCache", [&] {
      const Code code = calls_.unregister_cache(object_, cache_id);
      const std::lock_guard<std::mutex> lock(caches_mutex_);
      caches_.erase(cache_id);
      return Explain(CallKind::kOther, code);
    });
  }

  Status PullKvBlocks(const BlocksTransfer &t) override {
    return Transfer("PullKvBlocks", t.remote, t.ext, [&] {
      return calls_.pull_blocks(object_, ToCann(t.remote), ToCann(t.local), t.src_blocks, t.dst_blocks, ToCann(t.ext));
    });
  }
  Status PullKvCache(const CacheTransfer &t) override {
    return Transfer("PullKvCache", t.remote, t.ext, [&] {
      return calls_.pull_cache(object_, ToCann(t.remote), ToCann(t.local), t.local_batch_index, t.size, ToCann(t.ext));
    });
  }
  Status PushKvBlocks(const BlocksTransfer &t) override {
    return Transfer("PushKvBlocks", t.remote, t.ext, [&] {
      const auto [local, ext] = ForPush(t.local, t.ext);
      return calls_.push_blocks(object_, local, ToCann(t.remote), t.src_blocks, t.dst_blocks, ext);
    });
  }
  Status PushKvCache(const CacheTransfer &t) override {
    return Transfer("PushKvCache", t.remote, t.ext, [&] {
      const auto [local, ext] = ForPush(t.local, t.ext);
      return calls_.push_cache(object_, local, ToCann(t.remote), t.local_batch_index, t.size, ext);
    });
  }

  Result<uint16_t> ListenPort() override {
    return Call("QueryListenPort", [&]() -> Result<uint16_t> {
      const uint16_t port = listen_port_;
      return port != 0 ? Result<uint16_t>(port) : CannotTell("not listening");
    });
  }
  Result<LinkReport> QueryLink(uint64_t) override { return CannotTell("QueryLink: CANN tells nothing of its links"); }
  Result<HugePagesReport> WaitForHugePages() override { return CannotTell("WaitForHugePages: CANN asks for none"); }

 private:
  static Status NotInitialized() { return Status(LLM_FAILED, "not initialized"); }
  static Status CannotTell(const std::string &text) { return Status(LLM_FEATURE_NOT_ENABLED, text); }

  // Without the options of our own engine, which say nothing here.
  static Options ForTheLibrary(Options options) {
    for (auto it = options.begin(); it != options.end();) {
      it = it->first.rfind("datadist.", 0) == 0 ? options.erase(it) : std::next(it);
    }
    return options;
  }

  Status Start(Options options) {
    if (epoch_ != ProcessEpoch()) {
      return Status(LLM_FAILED, "made in another process: not usable after fork()");
    }
    const std::lock_guard<std::mutex> lock(start_mutex_);
    if (started_) {
      return Status::Ok();
    }
    if (abandoned_) {
      return Status(LLM_FAILED, "a call of before Finalize still runs");
    }
    if (Status ready = Prepare(options); !ready.ok()) {
      return ready;
    }
    const Status started = Listening(options, [&](const Options &with_port) {
      return Explain(CallKind::kOther, calls_.initialize(object_, ToCann(calls_.strings, with_port)));
    });
    if (started.ok()) {
      started_ = true;
      gate_.Open();
    } else {
      device_ = kNoDevice;
    }
    return started;
  }

  // Device and timeouts of the options; a device that is not named is the calling thread's.
  Status Prepare(Options &options) {
    const auto timeout = options.find(OPTION_SYNC_CACHE_WAIT_TIME);
    if (timeout != options.end()) {
      const Result<int32_t> milliseconds_given = ParseNumber(OPTION_SYNC_CACHE_WAIT_TIME, timeout->second);
      if (!milliseconds_given.ok()) {
        return milliseconds_given.status();
      }
      Bound(milliseconds_given.value());
    }
    const auto named = options.find(OPTION_DEVICE_ID);
    const Result<int32_t> device =
        named != options.end() ? ParseNumber(OPTION_DEVICE_ID, named->second) : library_.device.Current();
    if (!device.ok()) {
      return device.status();
    }
    options[OPTION_DEVICE_ID] = std::to_string(device.value());
    device_ = device.value();
    return library_.device.Enter(device.value());
  }

  // act(options with a port) -> Status.
  Status Listening(const Options &options, const std::function<Status(const Options &)> &act) {
    const Result<uint16_t> port = WithListenPort(options, act);
    if (!port.ok()) {
      return port.status();
    }
    listen_port_ = port.value();
    return Status::Ok();
  }

  // act(clusters, codes) -> the call's code.
  template <typename Act>
  Status ForClusters(const char *call, const std::vector<llm_datadist::ClusterInfo> &clusters,
                     std::vector<llm_datadist::Status> &rets, int32_t timeout_ms, const Act &act) {
    rets.clear();
    return Call(call, [&] {
      const auto infos = ToCann(calls_.strings, clusters);
      if (!infos.ok()) {
        return infos.status();
      }
      Bound(timeout_ms);
      std::vector<Code> codes;  // the library appends
      const Code code = act(infos.value(), codes);
      if (codes.empty() && code != LLM_SUCCESS) {
        return Explain(CallKind::kLink, code);
      }
      codes.resize(clusters.size(), LLM_FAILED);
      rets = codes;
      Status overall = Status::Ok();
      for (size_t i = 0; i < codes.size(); ++i) {
        if (codes[i] != LLM_SUCCESS) {
          const std::string about = "cluster " + std::to_string(clusters[i].remote_cluster_id);
          overall = Explain(CallKind::kLink, codes[i], about);
        }
      }
      return overall;
    });
  }

  // act() -> code. The library takes one layer range without the other for none at all, and transfers every layer.
  template <typename Act>
  Status Transfer(const char *call, const llm_datadist::CacheIndex &remote, const KvCacheExtParam &ext,
                  const Act &act) {
    return Call(call, [&] {
      if (Status checked = CheckExtParam(ext); !checked.ok()) {
        return checked;
      }
      const std::string about =
          "cache " + std::to_string(remote.cache_id) + " of cluster " + std::to_string(remote.cluster_id);
      return Explain(CallKind::kTransfer, act(), about);
    });
  }

  // The library takes the number of tensors from the caller, and, where every layer is meant, wants layers that divide
  // it: then each tensor is a layer.
  std::pair<Cache, ExtParam> ForPush(const llm_datadist::Cache &given, const KvCacheExtParam &given_ext) {
    std::pair<Cache, ExtParam> ready{ToCann(given), ToCann(given_ext)};
    auto &[cache, ext] = ready;
    if (cache.cache_desc.num_tensors == 0) {
      const std::lock_guard<std::mutex> lock(caches_mutex_);
      const auto found = caches_.find(given.cache_id);
      // An unknown cache has one tensor: the library then says that there is no such cache.
      cache.cache_desc.num_tensors = found == caches_.end() ? 1 : found->second;
    }
    if (ext.src_layer_range.first < 0 && cache.cache_desc.num_tensors % ext.tensor_num_per_layer != 0) {
      ext.tensor_num_per_layer = 1;
    }
    return ready;
  }

  // Under caches_mutex_.
  std::string RegistrationText(size_t addresses) const {
    uint64_t registered = 0;
    for (const auto &[id, num_tensors] : caches_) {
      registered += num_tensors;
    }
    return std::to_string(addresses) + " addresses beside the " + std::to_string(registered) +
           " that are registered, of " + std::to_string(kMaxRegions) + " regions at most";
  }

  // Finalize waits for the longest timeout that any call was given.
  void Bound(int32_t timeout_ms) {
    int64_t longest = longest_call_ms_;
    while (longest < timeout_ms && !longest_call_ms_.compare_exchange_weak(longest, timeout_ms)) {
    }
  }

  template <typename Act>
  auto Call(const char *call, const Act &act) -> decltype(act()) {
    if (epoch_ != ProcessEpoch()) {  // a lock may have been held when the child was made
      return Tell(call, NotInitialized());
    }
    const CallGate::Pass pass(gate_);
    return pass ? Guarded(call, act) : Tell(call, NotInitialized());
  }
  template <typename Act>
  static auto Guarded(const char *call, const Act &act) -> decltype(act()) {
    try {
      return Tell(call, act());
    } catch (const std::bad_alloc &) {
      return Tell(call, Status(LLM_OUT_OF_MEMORY, "out of memory"));
    } catch (const std::exception &error) {
      return Tell(call, Status(LLM_FAILED, error.what()));
    }
  }
  static Status Tell(const char *call, Status status) {
    return status.ok() ? status : Status(status.code(), std::string(call) + ": " + status.text());
  }
  template <typename T>
  static Result<T> Tell(const char *call, Result<T> result) {
    return result.ok() ? std::move(result) : Result<T>(Tell(call, result.status()));
  }

  const Library &library_;
  const Calls &calls_;
  Object *const object_;  // left as it is when calls hold it for ever
  const uint64_t epoch_ = ProcessEpoch();

  std::mutex start_mutex_;  // one Initialize or Finalize at a time
  bool started_ = false;    // guarded by start_mutex_
  bool abandoned_ = false;  // guarded by start_mutex_
  CallGate gate_;
  std::atomic<int32_t> device_{kNoDevice};
  std::atomic<uint16_t> listen_port_{0};
  std::atomic<int64_t> longest_call_ms_{kDefaultTransferTimeout.count()};

  std::mutex caches_mutex_;
  std::map<int64_t, uint32_t> caches_;  // tensors of each; guarded by caches_mutex_
};

}  // namespace

Result<std::unique_ptr<Provider>> MakeCannProvider(uint64_t cluster_id, LlmRole role) {
  const Result<const Library *> library = LoadLibrary();
  if (!library.ok()) {
    return library.status();
  }
  return std::unique_ptr<Provider>(std::make_unique<CannProvider>(*library.value(), cluster_id, role));
}

}  // namespace datadist::cann
