// A key file in a folder of its own, gone with the test.
#ifndef DATADIST_TESTS_SUPPORT_KEY_FILE_H_
#define DATADIST_TESTS_SUPPORT_KEY_FILE_H_

#include <stdlib.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <string>

namespace datadist::testing {

// Key number `index` as a line of a key file.
inline std::string KeyLine(char index) { return std::string(63, 'a') + index + "\n"; }

class KeyFile {
 public:
  explicit KeyFile(const std::string &text, mode_t mode = 0600) {
    std::string folder = "/tmp/datadist-key-XXXXXX";
    folder_ = ::mkdtemp(folder.data()) != nullptr ? folder : "";
    Write(text, mode);
  }
  ~KeyFile() { std::filesystem::remove_all(folder_); }
  KeyFile(const KeyFile &) = delete;
  KeyFile &operator=(const KeyFile &) = delete;

  std::string path() const { return folder_ + "/key"; }
  // Puts another file in its place, as one does to files that others read.
  void Write(const std::string &text, mode_t mode = 0600) {
    const std::string next = path() + ".next";
    std::ofstream(next) << text;
    ::chmod(next.c_str(), mode);
    std::filesystem::rename(next, path());
  }

 private:
  std::string folder_;
};

}  // namespace datadist::testing

#endif  // DATADIST_TESTS_SUPPORT_KEY_FILE_H_
