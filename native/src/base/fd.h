// Owns a file descriptor, in the process that got it: a child made by fork() has none of them. A listener that lived on
// in a child would take connections that nobody accepts, and a connection would not end with us.
#ifndef DATADIST_BASE_FD_H_
#define DATADIST_BASE_FD_H_

#include <utility>

namespace datadist {

class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd);
  Fd(Fd &&other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd &operator=(Fd &&other) noexcept {
    if (this != &other) {
      Reset();
      fd_ = std::exchange(other.fd_, -1);
    }
    return *this;
  }
  ~Fd() { Reset(); }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  void Reset();

 private:
  int fd_ = -1;
};

}  // namespace datadist

#endif  // DATADIST_BASE_FD_H_
