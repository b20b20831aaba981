// How a Python call enters the engine: without the GIL, counted, and with its reason kept for last_error().
//
// A thread that wants the GIL back while the interpreter shuts down is ended by Python (3.12 and older), which unwinds
// through frames that must not be unwound and aborts the process. So at exit the module
//   1. refuses further blocking calls, without giving up the GIL;
//   2. finalizes every endpoint, which makes the calls that are blocked in it return;
//   3. waits, for a bounded time, until those have the GIL again.
// Everything here but the waiting in step 3 happens under the GIL, which therefore guards it across fork() too.
#ifndef DATADIST_BINDINGS_CALLS_H_
#define DATADIST_BINDINGS_CALLS_H_

#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <utility>

#include "base/status.h"

namespace datadist::bindings {

// Remembers why the calling thread's last call failed and returns its code.
llm_datadist::Status Report(const Status &status);
const std::string &LastError();

// Finalizes the endpoint at interpreter exit, if it still lives then.
void AddExitEndpoint(std::weak_ptr<void> endpoint, void (*finalize)(void *));
template <typename Endpoint>
void FinalizeAtExit(const std::shared_ptr<Endpoint> &endpoint) {
  AddExitEndpoint(endpoint, [](void *raw) { static_cast<Endpoint *>(raw)->Finalize(); });
}

// Counts one blocking call from before the GIL is released until it is held again.
class ActiveCall {
 public:
  ActiveCall();
  ~ActiveCall();
  ActiveCall(const ActiveCall &) = delete;
  ActiveCall &operator=(const ActiveCall &) = delete;
  explicit operator bool() const { return admitted_; }

 private:
  bool admitted_;
};

// `call` returns a Status or a Result.
template <typename Call>
auto WithoutGil(Call &&call) -> decltype(call()) {
  const ActiveCall active;
  if (!active) {
    return Status(llm_datadist::LLM_FAILED, "the interpreter is exiting");
  }
  const pybind11::gil_scoped_release released;
  return call();
}

}  // namespace datadist::bindings

#endif  // DATADIST_BINDINGS_CALLS_H_
