// One line per event on stderr. The level comes from ASCEND_GLOBAL_LOG_LEVEL: 0 debug, 1 info, 2 warning, 3 error
// (default). Never a payload byte.
#ifndef DATADIST_BASE_LOG_H_
#define DATADIST_BASE_LOG_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>

namespace datadist {

enum class LogLevel : uint8_t { kDebug = 0, kInfo = 1, kWarning = 2, kError = 3 };

bool LogEnabled(LogLevel level);
void Log(LogLevel level, const std::string &text);

// For lines that a peer, or a program that tries again, can cause at will: a few per second, then silence until the
// second is over, so that nobody can fill a disk.
class LogBudget {
 public:
  bool Take();

 private:
  std::atomic<int64_t> second_{0};
  std::atomic<uint32_t> used_{0};
};

}  // namespace datadist

#endif  // DATADIST_BASE_LOG_H_
