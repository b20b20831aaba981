#include "engine/engine.h"

#include <algorithm>
#include <utility>

#include "cache/memory_pool.h"
#include "control/opening.h"

namespace datadist {
namespace {

using llm_datadist::LLM_EXIST_LINK;
using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_FEATURE_NOT_ENABLED;

constexpr uint64_t kMaxDefaultPool = uint64_t{1} << 40;  // a limit may be raised to more than any address space has

Result<Listeners> ListenAt(const SocketAddress &address, const Trust &trust) {
  Result<Listeners> bound = ListenOpen(address, trust);
  if (!bound.ok()) {
    return Status(bound.status().code(),
                  std::string(llm_datadist::OPTION_LISTEN_IP_INFO) + ": " + bound.status().text());
  }
  return bound;
}

// The Python API documents that caches come from configured pools only; programs for the C++ class configure none.
Result<CacheRegistry::Pools> MakePools(EngineApi api, const EngineOptions &options) {
  CacheRegistry::Pools pools;
  if (api == EngineApi::kCpp) {
    pools.default_device = PoolConfig{std::min(options.limits.max_device_bytes, kMaxDefaultPool)};
    pools.default_host = PoolConfig{std::min(options.limits.max_host_bytes, kMaxDefaultPool)};
  }
  for (const auto &[config, pool] : {std::pair(&options.device_pool, &pools.device),
                                     std::pair(&options.host_pool, &pools.host)}) {
    if (config->has_value()) {
      Result<std::shared_ptr<MemoryPool>> made = MemoryPool::Create(**config);
      if (!made.ok()) {
        return made.status();
      }
      *pool = std::move(made).value();
    }
  }
  return pools;
}

}  // namespace

Result<std::shared_ptr<Engine>> Engine::Start(uint64_t cluster_id, llm_datadist::LlmRole role, EngineApi api,
                                              const OptionMap &map) {
  Result<EngineOptions> parsed = ParseEarlyOptions(role, api, map);
  if (!parsed.ok()) {
    return parsed.status();
  }
  EngineOptions &options = parsed.value();
  Listeners listeners;
  if (options.listen.has_value()) {
    Result<Listeners> bound = ListenAt(*options.listen, options.link.trust);
    if (!bound.ok()) {
      return bound.status();
    }
    listeners = std::move(bound).value();
  }
  if (Status status = ParseLateOptions(map, options); !status.ok()) {
    return status;
  }
  const Result<CacheRegistry::Pools> pools = MakePools(api, options);
  if (!pools.ok()) {
    return pools.status();
  }
  const auto endpoint = std::make_shared<LocalEndpoint>(cluster_id, role, options.link, options.limits, pools.value(),
                                                        options.transfer_threads);
  if (Status status = endpoint->Start(); !status.ok()) {
    return status;
  }
  std::shared_ptr<Engine> engine(new Engine(endpoint, options));
  endpoint->loop()->Run([&engine, loop = endpoint->loop().get()] { engine->statistics_->StartOnLoop(loop); });
  if (listeners.tcp) {
    if (Status status = engine->StartListening(std::move(listeners), *options.listen); !status.ok()) {
      return status;
    }
  }
  return engine;
}

Engine::Engine(std::shared_ptr<LocalEndpoint> endpoint, const EngineOptions &options)
    : endpoint_(std::move(endpoint)),
      table_(std::make_shared<LinkTable>(endpoint_->cluster_id(), endpoint_->incarnation(), options.link.max_links)),
      statistics_(std::make_shared<Statistics>(endpoint_->cluster_id())),
      comms_(endpoint_, table_, options.link.max_links),
      comm_res_known_(options.comm_res_given || options.listen.has_value()),
      huge_pages_(options.huge_pages ? std::make_unique<HugePages>() : nullptr) {}

Engine::~Engine() { Stop(); }

void Engine::Stop() {
  if (huge_pages_ != nullptr) {
    huge_pages_->Stop();
  }
  comms_.Stop();
  StopListening();
  std::vector<std::shared_ptr<Link>> links = table_->Shut();
  for (const std::shared_ptr<Link> &link : links) {
    link->Close("finalized");
  }
  for (const std::shared_ptr<Link> &link : links) {
    link->WaitUntilServed();
  }
  endpoint_->StopServing();
  endpoint_->loop()->Stop();
  links.clear();
  endpoint_->caches()->Clear();
  if (!stopped_.exchange(true)) {
    statistics_->Log();
  }
}

// ---- listener and role ----

Status Engine::StartListening(Listeners listeners, const SocketAddress &asked) {
  const std::lock_guard<std::mutex> lock(listener_mutex_);
  asked_address_ = asked;
  listen_address_ = SocketAddress::LocalOf(listeners.tcp.get());
  acceptor_ = std::make_shared<Acceptor>(endpoint_, table_);
  comms_.SetServerAddress(listen_address_);
  const bool ran = endpoint_->loop()->Run([&] { acceptor_->StartOnLoop(std::move(listeners)); });
  return ran ? Status::Ok() : Status(LLM_FAILED, "the event loop ended");
}

void Engine::StopListening() {
  std::shared_ptr<Acceptor> acceptor;
  {
    const std::lock_guard<std::mutex> lock(listener_mutex_);
    acceptor.swap(acceptor_);
    comms_.SetServerAddress(std::nullopt);
  }
  if (acceptor != nullptr) {
    endpoint_->loop()->Run([&acceptor] { acceptor->StopOnLoop(); });
  }
}

Status Engine::MoveListener(const std::optional<SocketAddress> &wanted) {
  {
    const std::lock_guard<std::mutex> lock(listener_mutex_);
    const auto is_wanted = [&](const SocketAddress &address) { return address.ToString() == wanted->ToString(); };
    if (acceptor_ != nullptr && wanted.has_value() && (is_wanted(asked_address_) || is_wanted(listen_address_))) {
      return Status::Ok();
    }
  }
  StopListening();
  if (!wanted.has_value()) {
    return Status::Ok();
  }
  Result<Listeners> bound = ListenAt(*wanted, endpoint_->options().trust);
  if (!bound.ok()) {
    return bound.status();
  }
  return StartListening(std::move(bound).value(), *wanted);
}

Status Engine::SetRole(llm_datadist::LlmRole role, const OptionMap &map) {
  if (Status status = CheckRole(role); !status.ok()) {
    return status;
  }
  const Result<std::optional<SocketAddress>> wanted = ParseListenOption(map);
  if (!wanted.ok()) {
    return wanted.status();
  }
  const std::lock_guard<std::mutex> one_at_a_time(role_mutex_);
  if (endpoint_->options().hixl_backend) {
    const std::lock_guard<std::mutex> lock(listener_mutex_);
    if (wanted.value().has_value() && wanted.value()->ToString() != asked_address_.ToString()) {
      return Status(LLM_FEATURE_NOT_ENABLED, std::string(llm_datadist::OPTION_LISTEN_IP_INFO) + ": '" +
                                                 wanted.value()->ToString() + "', allowed with " +
                                                 llm_datadist::OPTION_TRANSFER_BACKEND + " 'hixl': " +
                                                 asked_address_.ToString() + ", or no such option");
    }
  } else {
    if (HasLinks() || !comms_.Empty()) {
      return Status(LLM_EXIST_LINK, "role " + std::to_string(static_cast<int32_t>(role)) +
                                        ": the role changes only when no link exists; unlink first");
    }
    if (Status status = MoveListener(wanted.value()); !status.ok()) {
      return status;
    }
  }
  endpoint_->SetRole(role);
  return Status::Ok();
}

Result<uint16_t> Engine::ListenPort() const {
  const std::lock_guard<std::mutex> lock(listener_mutex_);
  if (acceptor_ == nullptr) {
    return Status(LLM_FEATURE_NOT_ENABLED, std::string("not listening: no ") + llm_datadist::OPTION_LISTEN_IP_INFO);
  }
  return listen_address_.port();
}

// ---- caches ----

Result<int64_t> Engine::RegisterCache(const llm_datadist::CacheDesc &desc, const std::vector<uint64_t> &addrs,
                                      const Registration &registration, const RowKeys &keys) {
  Result<int64_t> id = endpoint_->caches()->Register(desc, addrs, registration, keys);
  if (id.ok() && huge_pages_ != nullptr) {
    if (const Result<CacheGeometry> geometry = ComputeGeometry(desc); geometry.ok()) {
      huge_pages_->Add(id.value(), addrs, geometry.value().tensor_bytes);
    }
  }
  return id;
}

void Engine::UnregisterCache(int64_t cache_id) {
  if (huge_pages_ != nullptr) {
    huge_pages_->Remove(cache_id);
  }
  endpoint_->caches()->Unregister(cache_id);
}

llm_datadist::HugePagesReport Engine::WaitForHugePages() {
  llm_datadist::HugePagesReport report;
  if (huge_pages_ != nullptr) {
    const HugePages::Report done = huge_pages_->Wait();
    report = {HugePagesAllowed(), done.bytes, done.huge_bytes, done.seconds};
  }
  return report;
}

}  // namespace datadist
