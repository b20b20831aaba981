#include "rules.h"

#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

namespace standin {
namespace {

uint64_t Number(const char *variable, uint64_t otherwise) {
  const char *const text = std::getenv(variable);
  return text == nullptr || *text == '\0' ? otherwise : std::strtoull(text, nullptr, 10);
}

}  // namespace

Rules Rules::FromEnvironment() {
  Rules rules;
  rules.strict = Number("CANN_STANDIN_STRICT", 0) != 0;
  rules.late_every = Number("CANN_STANDIN_LATE_EVERY", rules.late_every);
  rules.late = std::chrono::milliseconds(Number("CANN_STANDIN_LATE_MS", static_cast<uint64_t>(rules.late.count())));
  rules.max_links = Number("CANN_STANDIN_MAX_LINKS", rules.max_links);
  rules.max_regions = Number("CANN_STANDIN_MAX_REGIONS", rules.max_regions);
  rules.hang = Number("CANN_STANDIN_HANG", 0) != 0;
  rules.local_port = Number("CANN_STANDIN_LOCAL_PORT", 0) != 0;
  rules.steal_ports = Number("CANN_STANDIN_STEAL_PORTS", rules.steal_ports);
  return rules;
}

void Trace(const std::string &call, uint32_t code) {
  const char *const file = std::getenv("CANN_STANDIN_TRACE");
  if (file == nullptr || *file == '\0') {
    return;
  }
  char number[16];
  std::snprintf(number, sizeof(number), "0x%08X", code);
  const std::string line = std::to_string(::getpid()) + " " + call + " -> " + number + "\n";
  const int fd = ::open(file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (fd < 0 || ::write(fd, line.data(), line.size()) != static_cast<ssize_t>(line.size())) {
    std::perror(file);
  }
  if (fd >= 0) {
    ::close(fd);
  }
}

}  // namespace standin
