// The current device of a thread, by libascendcl.so: CANN keeps one per thread.
#ifndef DATADIST_PROVIDER_CANN_DEVICE_H_
#define DATADIST_PROVIDER_CANN_DEVICE_H_

#include <cstdint>

#include "base/status.h"

namespace datadist::cann {

class Device {
 public:
  // The library that the process has already, or that the loader finds by its name.
  static Result<Device> Load();

  // Makes the logical device `index` that of the calling thread.
  Status Enter(int32_t index) const;
  // LLM_FAILED while the calling thread has none.
  Result<int32_t> Current() const;

 private:
  int32_t (*set_)(int32_t index) = nullptr;
  int32_t (*get_)(int32_t *index) = nullptr;
};

}  // namespace datadist::cann

#endif  // DATADIST_PROVIDER_CANN_DEVICE_H_
