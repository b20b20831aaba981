#include "base/log.h"

#include <unistd.h>

#include <cstdlib>
#include <string_view>

#include "base/text.h"

namespace datadist {
namespace {

constexpr uint32_t kLinesPerSecond = 10;

LogLevel LevelFromEnvironment() {
  const char *text = std::getenv("ASCEND_GLOBAL_LOG_LEVEL");
  const std::string_view level = text == nullptr ? "" : text;
  if (level.size() == 1 && level[0] >= '0' && level[0] <= '3') {
    return static_cast<LogLevel>(level[0] - '0');
  }
  return LogLevel::kError;
}

const char *LevelName(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return "DEBUG";
    case LogLevel::kInfo:
      return "INFO";
    case LogLevel::kWarning:
      return "WARNING";
    case LogLevel::kError:
      return "ERROR";
  }
  return "?";
}

}  // namespace

bool LogEnabled(LogLevel level) {
  static const LogLevel lowest = LevelFromEnvironment();
  return level >= lowest;
}

void Log(LogLevel level, const std::string &text) {
  if (!LogEnabled(level)) {
    return;
  }
  const std::string line = std::string("[datadist] ") + LevelName(level) + " " + OneLine(text) + "\n";
  // One write per line, so that lines of several threads and processes do not mix. Nothing to do when stderr is gone.
  [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, line.data(), line.size());
}

bool LogBudget::Take() {
  using std::chrono::steady_clock;
  const int64_t now = std::chrono::duration_cast<std::chrono::seconds>(steady_clock::now().time_since_epoch()).count();
  if (second_.exchange(now) != now) {
    used_.store(0);
  }
  return used_.fetch_add(1) < kLinesPerSecond;
}

}  // namespace datadist
