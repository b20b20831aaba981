// How the stand-in behaves, by environment variables: see README.md.
#ifndef DATADIST_TESTS_STANDIN_RULES_H_
#define DATADIST_TESTS_STANDIN_RULES_H_

#include <chrono>
#include <cstdint>
#include <string>

namespace standin {

struct Rules {
  static Rules FromEnvironment();

  bool strict = false;
  uint64_t late_every = 0;  // 0: never
  std::chrono::milliseconds late{2000};
  uint64_t max_links = 512;
  uint64_t max_regions = 256;
  uint64_t steal_ports = 0;
  bool hang = false;
  bool local_port = false;
};

// One line per call into the file of CANN_STANDIN_TRACE, if there is one.
void Trace(const std::string &call, uint32_t code);

}  // namespace standin

#endif  // DATADIST_TESTS_STANDIN_RULES_H_
