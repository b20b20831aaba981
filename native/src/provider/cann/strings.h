// Strings of CANN's library: 16 bytes that only the library fills and compares.
//
// What it holds is a shared pointer to a string of the library's own C++ ABI. Whoever destroys it needs to know no more
// than that it is a shared pointer: its control block knows the rest. Never read the text behind it from here.
#ifndef DATADIST_PROVIDER_CANN_STRINGS_H_
#define DATADIST_PROVIDER_CANN_STRINGS_H_

#include <memory>
#include <string>

namespace datadist::cann {

// The library's constructor and its operator<, as member functions are called: the object first.
struct StringCalls {
  void (*construct)(void *string, const char *text) = nullptr;
  bool (*less)(const void *left, const void *right) = nullptr;
};

class String {
 public:
  String() = default;  // as the library's default constructor leaves it: all zero
  String(const StringCalls &calls, const std::string &text) { calls.construct(&held_, text.c_str()); }

 private:
  std::shared_ptr<void> held_;
};
static_assert(sizeof(String) == 16 && alignof(String) == 8);

// The order in which the library looks for keys. A member of the map: it takes the place of the library's own
// comparator, which is empty, and the eight bytes that are there for it.
struct StringLess {
  bool (*less)(const void *left, const void *right) = nullptr;
  bool operator()(const String &left, const String &right) const { return less(&left, &right); }
};

}  // namespace datadist::cann

#endif  // DATADIST_PROVIDER_CANN_STRINGS_H_
