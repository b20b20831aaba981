#include "calls.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <utility>
#include <vector>

#include "register.h"

namespace py = pybind11;

namespace datadist::bindings {
namespace {

// Longer than an engine needs to break off a call that it finalizes; short enough not to be taken for a hang.
constexpr std::chrono::seconds kExitWait(3);

struct ExitEndpoint {
  std::weak_ptr<void> endpoint;
  void (*finalize)(void *);
};

struct Calls {
  std::mutex mutex;
  std::condition_variable returned;
  size_t active = 0;
  bool exiting = false;
  std::vector<ExitEndpoint> endpoints;
};

// Never destroyed: threads that outlive the interpreter may still be in a call.
Calls &TheCalls() {
  static Calls *const calls = new Calls;
  return *calls;
}

std::string &ThreadError() {
  thread_local std::string text;
  return text;
}

void OnExit() {
  Calls &calls = TheCalls();
  std::vector<std::pair<std::shared_ptr<void>, void (*)(void *)>> live;
  for (const ExitEndpoint &entry : calls.endpoints) {
    if (std::shared_ptr<void> endpoint = entry.endpoint.lock()) {
      live.emplace_back(std::move(endpoint), entry.finalize);
    }
  }
  const py::gil_scoped_release released;
  {
    const std::lock_guard<std::mutex> lock(calls.mutex);
    calls.exiting = true;
  }
  for (const auto &[endpoint, finalize] : live) {
    finalize(endpoint.get());
  }
  live.clear();
  std::unique_lock<std::mutex> lock(calls.mutex);
  calls.returned.wait_for(lock, kExitWait, [&calls] { return calls.active == 0; });
}

// The calls that the parent's other threads were in never return here, and its endpoints are not this process's.
void AfterForkInChild() {
  Calls &calls = TheCalls();
  calls.active = 0;
  calls.endpoints.clear();
}

}  // namespace

llm_datadist::Status Report(const Status &status) {
  ThreadError() = status.text();
  return status.code();
}

const std::string &LastError() { return ThreadError(); }

void AddExitEndpoint(std::weak_ptr<void> endpoint, void (*finalize)(void *)) {
  std::vector<ExitEndpoint> &endpoints = TheCalls().endpoints;
  endpoints.erase(std::remove_if(endpoints.begin(), endpoints.end(),
                                 [](const ExitEndpoint &entry) { return entry.endpoint.expired(); }),
                  endpoints.end());
  endpoints.push_back({std::move(endpoint), finalize});
}

ActiveCall::ActiveCall() {
  Calls &calls = TheCalls();
  const std::lock_guard<std::mutex> lock(calls.mutex);
  admitted_ = !calls.exiting;
  calls.active += admitted_ ? 1U : 0U;
}

ActiveCall::~ActiveCall() {
  if (admitted_) {
    Calls &calls = TheCalls();
    const std::lock_guard<std::mutex> lock(calls.mutex);
    --calls.active;
    calls.returned.notify_all();
  }
}

void RegisterExit(py::module_ &) {
  py::module_::import("atexit").attr("register")(py::cpp_function(&OnExit));
  py::module_::import("os").attr("register_at_fork")(py::arg("after_in_child") = py::cpp_function(&AfterForkInChild));
}

}  // namespace datadist::bindings
