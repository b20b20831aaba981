#include "engine/json_check.h"

#include <algorithm>
#include <array>

#include "llm_datadist/llm_datadist.h"

namespace datadist {
namespace {

using llm_datadist::LLM_PARAM_INVALID;

constexpr int kMaxDepth = 64;
constexpr std::array<std::string_view, 3> kKnownVersions = {"1.0", "1.2", "1.3"};

class JsonScanner {
 public:
  explicit JsonScanner(std::string_view text) : text_(text) {}

  bool ScanDocument() {
    SkipSpace();
    const bool ok = Peek() == '{' && ScanValue(0);
    SkipSpace();
    return ok && at_ == text_.size();
  }
  size_t position() const { return at_; }
  const JsonObjectInfo &info() const { return info_; }

 private:
  char Peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  bool Accept(char wanted) {
    if (at_ >= text_.size() || text_[at_] != wanted) {
      return false;
    }
    ++at_;
    return true;
  }
  void SkipSpace() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) {
      ++at_;
    }
  }

  bool ScanValue(int depth) {
    if (depth > kMaxDepth) {
      return false;
    }
    switch (Peek()) {
      case '{':
        return ScanObject(depth);
      case '[':
        return ScanArray(depth);
      case '"':
        return ScanString();
      case 't':
        return ScanWord("true");
      case 'f':
        return ScanWord("false");
      case 'n':
        return ScanWord("null");
      default:
        return ScanNumber();
    }
  }

  bool ScanObject(int depth) {
    ++at_;
    SkipSpace();
    if (Accept('}')) {
      return true;
    }
    do {
      SkipSpace();
      const size_t key_at = at_;
      if (!ScanString()) {
        return false;
      }
      const std::string_view key = text_.substr(key_at, at_ - key_at);
      SkipSpace();
      if (!Accept(':')) {
        return false;
      }
      SkipSpace();
      const size_t value_at = at_;
      if (!ScanValue(depth + 1)) {
        return false;
      }
      if (depth == 0 && key == "\"version\"" && text_[value_at] == '"') {
        info_.has_version = true;
        info_.version = std::string(text_.substr(value_at + 1, at_ - value_at - 2));
      }
      SkipSpace();
    } while (Accept(','));
    return Accept('}');
  }

  bool ScanArray(int depth) {
    ++at_;
    SkipSpace();
    if (Accept(']')) {
      return true;
    }
    do {
      SkipSpace();
      if (!ScanValue(depth + 1)) {
        return false;
      }
      SkipSpace();
    } while (Accept(','));
    return Accept(']');
  }

  bool ScanString() {
    if (!Accept('"')) {
      return false;
    }
    while (at_ < text_.size()) {
      const char c = text_[at_++];
      if (c == '"') {
        return true;
      }
      if (static_cast<unsigned char>(c) < 0x20 || (c == '\\' && !ScanEscape())) {
        return false;
      }
    }
    return false;
  }

  bool ScanEscape() {
    if (Accept('u')) {
      for (int i = 0; i < 4; ++i, ++at_) {
        if (at_ >= text_.size() || !IsHex(text_[at_])) {
          return false;
        }
      }
      return true;
    }
    const bool ok = at_ < text_.size() && std::string_view("\"\\/bfnrt").find(text_[at_]) != std::string_view::npos;
    at_ += ok ? 1 : 0;
    return ok;
  }

  bool ScanWord(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) {
      return false;
    }
    at_ += word.size();
    return true;
  }

  bool ScanNumber() {
    Accept('-');
    if (!Accept('0') && !ScanDigits()) {
      return false;
    }
    if (Accept('.') && !ScanDigits()) {
      return false;
    }
    if (Accept('e') || Accept('E')) {
      if (!Accept('+')) {
        Accept('-');
      }
      return ScanDigits();
    }
    return true;
  }

  bool ScanDigits() {
    const size_t start = at_;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') {
      ++at_;
    }
    return at_ > start;
  }

  static bool IsHex(char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
  }

  const std::string_view text_;
  size_t at_ = 0;
  JsonObjectInfo info_;
};

}  // namespace

Result<JsonObjectInfo> CheckJsonObject(std::string_view text) {
  JsonScanner scanner(text);
  if (!scanner.ScanDocument()) {
    return Status(LLM_PARAM_INVALID,
                  "not a well-formed JSON object (at byte " + std::to_string(scanner.position()) + ")");
  }
  return scanner.info();
}

Status CheckLocalCommRes(std::string_view text) {
  if (text.empty()) {
    return Status::Ok();
  }
  const std::string option = llm_datadist::OPTION_LOCAL_COMM_RES;
  const Result<JsonObjectInfo> info = CheckJsonObject(text);
  if (!info.ok()) {
    return Status(LLM_PARAM_INVALID, option + ": " + info.status().text());
  }
  const std::string &version = info.value().version;
  if (std::find(kKnownVersions.begin(), kKnownVersions.end(), version) == kKnownVersions.end()) {
    const std::string said = info.value().has_version ? "version '" + version + "'" : std::string("no version");
    return Status(LLM_PARAM_INVALID, option + ": " + said + ", allowed: '1.0', '1.2', '1.3'");
  }
  return Status::Ok();
}

}  // namespace datadist
