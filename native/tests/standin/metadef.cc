// ge::AscendString as CANN ships it: in a library of its own, with the old ABI of std::string, laid out as one shared
// pointer. Built with _GLIBCXX_USE_CXX11_ABI=0: who reads the text with our own header's class reads nonsense.
#include <memory>
#include <string>

#define STANDIN_EXPORT __attribute__((visibility("default")))

namespace ge {

class STANDIN_EXPORT AscendString {
 public:
  AscendString(const char *text);
  bool operator<(const AscendString &other) const;
  const char *GetString() const;

 private:
  std::shared_ptr<std::string> text_;
};
static_assert(sizeof(AscendString) == 16, "one shared pointer");

AscendString::AscendString(const char *text) {
  if (text != nullptr) {
    text_ = std::make_shared<std::string>(text);
  }
}

const char *AscendString::GetString() const { return text_ == nullptr ? "" : text_->c_str(); }

bool AscendString::operator<(const AscendString &other) const {
  return std::string(GetString()) < std::string(other.GetString());
}

}  // namespace ge

// For the stand-in of libllm_datadist.so, in which the name of the class is that of our engine's.
extern "C" STANDIN_EXPORT const char *StandInText(const void *string) {
  return static_cast<const ge::AscendString *>(string)->GetString();
}
