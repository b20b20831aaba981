// The two functions of libascendcl.so that the provider calls: the device of a thread.
#include <cstdint>

#define STANDIN_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int32_t kDevices = 8;
constexpr int32_t kInvalidDevice = 107001;
constexpr int32_t kNoContext = 107002;

thread_local int32_t device = -1;

}  // namespace

STANDIN_EXPORT int32_t aclrtSetDevice(int32_t index) {
  if (index < 0 || index >= kDevices) {
    return kInvalidDevice;
  }
  device = index;
  return 0;
}

STANDIN_EXPORT int32_t aclrtGetDevice(int32_t *index) {
  if (device < 0) {
    return kNoContext;
  }
  *index = device;
  return 0;
}
