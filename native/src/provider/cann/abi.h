// What crosses the border to CANN's libllm_datadist.so, laid out as that library lays it out.
//
// Never in the namespaces `ge` or `llm_datadist`: two classes of one name and different layout in one process are taken
// for one another by the linker, and the library then reads strings that are none.
#ifndef DATADIST_PROVIDER_CANN_ABI_H_
#define DATADIST_PROVIDER_CANN_ABI_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "provider/cann/strings.h"

namespace datadist::cann {

using Code = uint32_t;
using OptionMap = std::map<String, String, StringLess>;

struct IpInfo {
  String ip;
  uint16_t port = 0;
  uint8_t reserved[128] = {};
};

struct ClusterInfo {
  uint64_t remote_cluster_id = 0;
  int32_t remote_role_type = 0;
  std::vector<IpInfo> local_ip_infos;
  std::vector<IpInfo> remote_ip_infos;
  uint8_t reserved[128] = {};
};

struct CacheIndex {
  uint64_t cluster_id = 0;
  int64_t cache_id = 0;
  uint32_t batch_index = 0;
  uint8_t reserved[128] = {};
};

struct CacheDesc {
  uint32_t placement = 0;
  uint32_t num_tensors = 0;
  int32_t data_type = 0;
  std::vector<int64_t> shape;
  uint8_t reserved[128] = {};
};

struct Cache {
  int64_t cache_id = -1;
  std::vector<uint64_t> tensor_addrs;
  CacheDesc cache_desc;
  uint8_t reserved[128] = {};
};

struct ExtParam {
  std::pair<int32_t, int32_t> src_layer_range = {-1, -1};
  std::pair<int32_t, int32_t> dst_layer_range = {-1, -1};
  uint8_t tensor_num_per_layer = 2;
  uint8_t reserved[127] = {};
};

struct RegisterCfg {
  uint8_t reserved[128] = {};
};

// An LlmDataDist: a pointer to what only the library knows, made and unmade by its constructor and destructor.
struct Object {
  void *impl = nullptr;
};

// The layout of every version from 8.5 on, with either ABI of std::string, on x86_64 and aarch64.
static_assert(sizeof(OptionMap) == 48);
static_assert(sizeof(IpInfo) == 152 && offsetof(IpInfo, port) == 16 && offsetof(IpInfo, reserved) == 18);
static_assert(sizeof(ClusterInfo) == 192 && offsetof(ClusterInfo, remote_role_type) == 8 &&
              offsetof(ClusterInfo, local_ip_infos) == 16 && offsetof(ClusterInfo, remote_ip_infos) == 40 &&
              offsetof(ClusterInfo, reserved) == 64);
static_assert(sizeof(CacheIndex) == 152 && offsetof(CacheIndex, cache_id) == 8 &&
              offsetof(CacheIndex, batch_index) == 16 && offsetof(CacheIndex, reserved) == 20);
static_assert(sizeof(CacheDesc) == 168 && offsetof(CacheDesc, num_tensors) == 4 &&
              offsetof(CacheDesc, data_type) == 8 && offsetof(CacheDesc, shape) == 16 &&
              offsetof(CacheDesc, reserved) == 40);
static_assert(sizeof(Cache) == 328 && offsetof(Cache, tensor_addrs) == 8 && offsetof(Cache, cache_desc) == 32 &&
              offsetof(Cache, reserved) == 200);
static_assert(sizeof(ExtParam) == 144 && offsetof(ExtParam, dst_layer_range) == 8 &&
              offsetof(ExtParam, tensor_num_per_layer) == 16 && offsetof(ExtParam, reserved) == 17);
static_assert(sizeof(RegisterCfg) == 128);
static_assert(sizeof(Object) == 8 && alignof(Object) == 8);

}  // namespace datadist::cann

#endif  // DATADIST_PROVIDER_CANN_ABI_H_
