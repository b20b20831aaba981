// Runs a target where the compiler has no libFuzzer, with the flags of libFuzzer that are used here:
//
//   TARGET [-seed=N] [-runs=N] [-max_total_time=SECONDS] [-max_len=BYTES] [-artifact_prefix=PATH] [FILE or FOLDER...]
//
// Every input that is named is run once; then, with a number of runs or seconds (whichever ends first), changed ones.
// Where the engine was compiled with -fsanitize-coverage=trace-pc, which GCC has too, inputs that reach what none did
// before are kept and changed further. What ends the process is written to a file first: crash-SEED-RUN.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "fuzz/coverage.h"
#include "fuzz/fuzz.h"
#include "fuzz/mutate.h"

// Of the sanitizers, where they are linked.
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());
// Optional parts of a target, as libFuzzer knows them.
extern "C" __attribute__((weak)) size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size,
                                                                unsigned int seed);

// A length that a decoder believes must not be had as memory: far more than the largest frame, and it is a finding.
extern "C" const char *__asan_default_options() {
  return "max_allocation_size_mb=64:detect_stack_use_after_return=1:strict_string_checks=1";
}
// GCC's two runtimes know nothing of each other: what ends the process in this one is seen as SIGABRT.
extern "C" const char *__ubsan_default_options() { return "print_stacktrace=1:abort_on_error=1"; }

namespace datadist::fuzz {
namespace {

constexpr unsigned kHangSeconds = 10;  // of one input

// ---- what is kept of an input that ends the process ----

const Bytes *running = nullptr;
char artifact[4096];

// Only what may be called when the heap is in pieces.
void KeepRunning() {
  if (running == nullptr) {
    return;
  }
  const int fd = ::open(artifact, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  const bool kept = fd >= 0 && ::write(fd, running->data(), running->size()) == static_cast<ssize_t>(running->size());
  running = nullptr;
  const char *const said = kept ? "\nthe input is in " : "\nthe input cannot be written to ";
  (void)!::write(STDERR_FILENO, said, std::strlen(said));
  (void)!::write(STDERR_FILENO, artifact, std::strlen(artifact));
  (void)!::write(STDERR_FILENO, "\n", 1);
}

void OnSignal(int number) {
  if (number == SIGALRM) {
    constexpr char kSaid[] = "an input hangs";
    (void)!::write(STDERR_FILENO, kSaid, sizeof(kSaid) - 1);
  }
  KeepRunning();
  std::signal(number, SIG_DFL);
  ::raise(number == SIGALRM ? SIGKILL : number);
}

void KeepWhatEndsUs() {
  if (__sanitizer_set_death_callback != nullptr) {
    __sanitizer_set_death_callback(KeepRunning);
  } else {
    std::signal(SIGSEGV, OnSignal);
  }
  std::signal(SIGABRT, OnSignal);
  std::signal(SIGALRM, OnSignal);
}

// ---- running ----

struct Settings {
  uint64_t seed = std::random_device()();
  uint64_t runs = 0;
  uint64_t seconds = 0;
  uint64_t max_size = 8192;
  std::string artifact_prefix;
  std::vector<std::filesystem::path> inputs;
};

[[noreturn]] void Fail(const std::string &why) {
  std::fprintf(stderr, "%s\n", why.c_str());
  std::exit(2);
}

Settings Parse(int count, char **arguments) {
  Settings settings;
  for (int i = 1; i < count; ++i) {
    const std::string_view argument = arguments[i];
    const std::string_view value = argument.substr(std::min(argument.find('=') + 1, argument.size()));
    const std::string_view name = argument.substr(0, argument.size() - value.size());
    const auto number = [&](uint64_t &out) {
      if (std::from_chars(value.data(), value.data() + value.size(), out).ptr != value.data() + value.size()) {
        Fail(std::string(argument) + ": no number");
      }
    };
    if (name == "-seed=") {
      number(settings.seed);
    } else if (name == "-runs=") {
      number(settings.runs);
    } else if (name == "-max_total_time=") {
      number(settings.seconds);
    } else if (name == "-max_len=") {
      number(settings.max_size);
    } else if (name == "-artifact_prefix=") {
      settings.artifact_prefix = value;
    } else if (argument.front() == '-') {
      Fail(std::string(argument) + ": unknown; see the head of standalone_main.cc");
    } else {
      settings.inputs.emplace_back(argument);
    }
  }
  return settings;
}

Bytes Load(const std::filesystem::path &path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    Fail("cannot read " + path.string());
  }
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

std::vector<Bytes> LoadAll(const std::vector<std::filesystem::path> &inputs) {
  std::vector<std::filesystem::path> files;
  for (const std::filesystem::path &input : inputs) {
    if (!std::filesystem::is_directory(input)) {
      files.push_back(input);
      continue;
    }
    for (const auto &entry : std::filesystem::directory_iterator(input)) {
      files.push_back(entry.path());
    }
  }
  std::sort(files.begin(), files.end());  // or a seed would not say the same everywhere
  std::vector<Bytes> loaded;
  std::transform(files.begin(), files.end(), std::back_inserter(loaded), Load);
  return loaded;
}

Random generator;

class Runner {
 public:
  explicit Runner(const Settings &settings) : settings_(settings) {}

  uint64_t executed() const { return executed_; }

  void Run(const Bytes &input) {
    std::snprintf(artifact, sizeof(artifact), "%scrash-%llu-%llu", settings_.artifact_prefix.c_str(),
                  static_cast<unsigned long long>(settings_.seed), static_cast<unsigned long long>(executed_));
    // A copy of that size, so that a read past its end is seen.
    Bytes copy(input);
    copy.shrink_to_fit();
    running = &input;
    LLVMFuzzerTestOneInput(copy.data(), copy.size());
    running = nullptr;
    ++executed_;
    if (copy != input) {
      Fail("the target has changed its input");
    }
  }

  void Explore(std::vector<Bytes> corpus) {
    using Clock = std::chrono::steady_clock;
    const auto end = Clock::now() + std::chrono::seconds(settings_.seconds);
    corpus.emplace_back();  // to begin from nothing, too
    for (uint64_t run = 0; settings_.runs == 0 || run < settings_.runs; ++run) {
      if (run % 64 == 0) {
        ::alarm(kHangSeconds);
        if (settings_.seconds != 0 && Clock::now() >= end) {
          break;
        }
      }
      Bytes input = corpus[generator() % corpus.size()];
      Change(input, corpus);
      Run(input);
      if (ReachedSomethingNew()) {
        corpus.push_back(std::move(input));
      }
    }
    ::alarm(0);
    std::printf("%zu inputs at the end, %zu places reached\n", corpus.size(), PlacesReached());
  }

 private:
  void Change(Bytes &input, const std::vector<Bytes> &corpus) const {
    if (generator() % 4 == 0) {
      Splice(input, corpus[generator() % corpus.size()], settings_.max_size, generator);
    }
    if (LLVMFuzzerCustomMutator == nullptr) {
      for (uint64_t changes = 1 + generator() % 4; changes > 0; --changes) {
        MutateOnce(input, settings_.max_size, generator);
      }
      return;
    }
    const size_t size = input.size();
    input.resize(std::max<size_t>(size, settings_.max_size));
    input.resize(LLVMFuzzerCustomMutator(input.data(), size, input.size(), static_cast<unsigned int>(generator())));
  }

  const Settings &settings_;
  uint64_t executed_ = 0;
};

}  // namespace
}  // namespace datadist::fuzz

extern "C" size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size) {
  using namespace datadist::fuzz;  // NOLINT(google-build-using-namespace): this file's own
  Bytes bytes(data, data + size);
  for (uint64_t changes = 1 + generator() % 4; changes > 0; --changes) {
    MutateOnce(bytes, max_size, generator);
  }
  std::copy(bytes.begin(), bytes.end(), data);
  return bytes.size();
}

int main(int count, char **arguments) {
  using namespace datadist::fuzz;  // NOLINT(google-build-using-namespace): this file's own
  const Settings settings = Parse(count, arguments);
  generator.seed(settings.seed);
  std::printf("seed %llu\n", static_cast<unsigned long long>(settings.seed));
  std::fflush(stdout);
  KeepWhatEndsUs();
  std::vector<Bytes> corpus = LoadAll(settings.inputs);
  Runner runner(settings);
  for (const Bytes &input : corpus) {
    ::alarm(kHangSeconds);
    runner.Run(input);
  }
  if (settings.runs != 0 || settings.seconds != 0) {
    runner.Explore(std::move(corpus));
  }
  std::printf("%llu executions\n", static_cast<unsigned long long>(runner.executed()));
  if (runner.executed() == 0) {
    Fail("nothing was executed: name inputs, -runs=N or -max_total_time=SECONDS");
  }
  return 0;
}
