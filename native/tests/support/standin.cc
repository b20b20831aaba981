#include "support/standin.h"

#include <sys/wait.h>
#include <unistd.h>

#include <climits>
#include <cstdio>
#include <cstdlib>

#include "provider/cann/loader.h"

namespace datadist::testing {

std::string BuiltFile(const std::string &name) {
  char path[PATH_MAX] = {};
  if (::readlink("/proc/self/exe", path, sizeof(path) - 1) < 0) {
    return name;
  }
  const std::string program(path);
  return program.substr(0, program.rfind('/') + 1) + name;
}

std::string InChild(const std::function<std::string()> &act) {
  int ends[2];
  if (::pipe(ends) != 0) {
    return "pipe failed";
  }
  std::fflush(nullptr);  // or the child writes it again
  const pid_t child = ::fork();
  if (child == 0) {
    ::close(ends[0]);
    const std::string text = act();
    const ssize_t written = ::write(ends[1], text.data(), text.size());
    ::_exit(written == static_cast<ssize_t>(text.size()) ? 0 : 1);
  }
  ::close(ends[1]);
  std::string told;
  char part[4096];
  for (ssize_t count = 0; (count = ::read(ends[0], part, sizeof(part))) > 0;) {
    told.append(part, static_cast<size_t>(count));
  }
  ::close(ends[0]);
  int status = 0;
  ::waitpid(child, &status, 0);
  if (WIFSIGNALED(status)) {
    return "ended by signal " + std::to_string(WTERMSIG(status));
  }
  return told;
}

void UseStandIn() { ::setenv(cann::kLibraryVariable, BuiltFile("standin/libllm_datadist.so").c_str(), 1); }

}  // namespace datadist::testing
