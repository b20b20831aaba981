#include "provider/cann/device.h"

#include <dlfcn.h>

#include <string>

namespace datadist::cann {
namespace {

using llm_datadist::LLM_FAILED;

constexpr char kLibrary[] = "libascendcl.so";
constexpr char kAdvice[] = "is the set_env.sh of CANN sourced, and the driver of the device mounted?";

}  // namespace

Result<Device> Device::Load() {
  void *const library = ::dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return Status(LLM_FAILED, std::string(::dlerror()) + "; " + kAdvice);
  }
  Device device;
  device.set_ = reinterpret_cast<decltype(device.set_)>(::dlsym(library, "aclrtSetDevice"));
  device.get_ = reinterpret_cast<decltype(device.get_)>(::dlsym(library, "aclrtGetDevice"));
  if (device.set_ == nullptr || device.get_ == nullptr) {
    return Status(LLM_FAILED, std::string(kLibrary) + " has no aclrtSetDevice or no aclrtGetDevice; " + kAdvice);
  }
  return device;
}

Status Device::Enter(int32_t index) const {
  const int32_t error = set_(index);
  if (error == 0) {
    return Status::Ok();
  }
  return Status(LLM_FAILED, "aclrtSetDevice(" + std::to_string(index) + ") answered " + std::to_string(error) +
                                "; the index counts the devices of ASCEND_RT_VISIBLE_DEVICES, from 0");
}

Result<int32_t> Device::Current() const {
  int32_t index = 0;
  const int32_t error = get_(&index);
  if (error == 0) {
    return index;
  }
  return Status(LLM_FAILED, "this thread has no device: aclrtGetDevice answered " + std::to_string(error));
}

}  // namespace datadist::cann
