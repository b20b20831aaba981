// Two processes of one host that wait for each other, by one line at a time through a named pipe for each direction.
#ifndef LLM_DATADIST_EXAMPLE_MEETING_H_
#define LLM_DATADIST_EXAMPLE_MEETING_H_

#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

namespace example {

class Meeting {
 public:
  Meeting(const std::string &directory, bool is_prompt)
      : inbox_(directory + (is_prompt ? "/to_prompt" : "/to_decoder")),
        outbox_(directory + (is_prompt ? "/to_decoder" : "/to_prompt")) {}

  void Tell(const std::string &line) {
    const std::string text = line + "\n";
    if (write(outbox_.fd, text.data(), text.size()) != static_cast<ssize_t>(text.size())) {
      throw std::runtime_error("cannot write to the peer's pipe: " + std::string(std::strerror(errno)));
    }
  }

  // The peer's next line. A peer that died must not make us wait for ever.
  std::string Hear() {
    std::string line;
    char letter = 0;
    for (;;) {
      pollfd waiting{inbox_.fd, POLLIN, 0};
      if (poll(&waiting, 1, kPatienceMs) != 1 || read(inbox_.fd, &letter, 1) != 1) {
        throw std::runtime_error("the other process says nothing");
      }
      if (letter == '\n') {
        return line;
      }
      line.push_back(letter);
    }
  }

  void Expect(const std::string &line) {
    const std::string heard = Hear();
    if (heard != line) {
      throw std::runtime_error("expected '" + line + "' of the other process, heard '" + heard + "'");
    }
  }

 private:
  static constexpr int kPatienceMs = 30'000;

  // Whoever comes first makes the pipe. Opened for reading and writing it waits for nobody, and a line that is written
  // before the peer has opened it stays.
  struct Pipe {
    explicit Pipe(const std::string &path) {
      if (mkfifo(path.c_str(), 0600) != 0 && errno != EEXIST) {
        throw std::runtime_error("cannot make the pipe " + path + ": " + std::strerror(errno));
      }
      fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
      if (fd < 0) {
        throw std::runtime_error("cannot open the pipe " + path + ": " + std::strerror(errno));
      }
    }
    ~Pipe() { close(fd); }
    Pipe(const Pipe &) = delete;
    Pipe &operator=(const Pipe &) = delete;

    int fd = -1;
  };

  Pipe inbox_;
  Pipe outbox_;
};

}  // namespace example

#endif  // LLM_DATADIST_EXAMPLE_MEETING_H_
