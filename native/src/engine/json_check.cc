#include "engine/json_check.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <limits>
#include <utility>

#include "llm_datadist/llm_datadist.h"

namespace datadist {
namespace {

using llm_datadist::LLM_PARAM_INVALID;

constexpr int kMaxDepth = 64;
constexpr std::array<std::string_view, 3> kKnownVersions = {R"("1.0")", R"("1.2")", R"("1.3")"};
constexpr uint32_t kMinPageShift = 10;
constexpr uint32_t kMaxPageShift = 30;
constexpr uint64_t kMaxPoolPages = std::numeric_limits<uint32_t>::max() - uint64_t{1};

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
  JsonMembers TakeMembers() { return std::move(members_); }

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
      if (depth == 0) {
        members_.insert_or_assign(std::string(key.substr(1, key.size() - 2)),
                                  std::string(text_.substr(value_at, at_ - value_at)));
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
  JsonMembers members_;
};

// A number without sign, fraction and exponent.
Result<uint64_t> ReadUnsigned(const JsonMembers &members, const char *name, uint64_t lowest, uint64_t highest) {
  const auto member = members.find(name);
  const std::string value = member == members.end() ? std::string() : member->second;
  uint64_t number = 0;
  const char *const end = value.data() + value.size();
  const auto [stopped, error] = std::from_chars(value.data(), end, number);
  if (error != std::errc() || stopped != end || number < lowest || number > highest) {
    return Status(LLM_PARAM_INVALID, std::string(name) + (value.empty() ? " is missing" : ": " + value) +
                                         ", allowed: a number in " + std::to_string(lowest) + ".." +
                                         std::to_string(highest));
  }
  return number;
}

Result<PoolConfig> PoolConfigOf(const JsonMembers &members) {
  PoolConfig config;
  if (members.count("page_shift") != 0) {
    const Result<uint64_t> shift = ReadUnsigned(members, "page_shift", kMinPageShift, kMaxPageShift);
    if (!shift.ok()) {
      return shift.status();
    }
    config.page_shift = static_cast<uint32_t>(shift.value());
  }
  // One byte more would be a whole page too many.
  const uint64_t highest = ((kMaxPoolPages + 1) << config.page_shift) - 1;
  const Result<uint64_t> size = ReadUnsigned(members, "memory_size", 1, highest);
  if (!size.ok()) {
    return size.status();
  }
  config.memory_size = size.value();
  return config;
}

}  // namespace

Result<JsonMembers> ParseJsonObject(std::string_view text) {
  JsonScanner scanner(text);
  if (!scanner.ScanDocument()) {
    return Status(LLM_PARAM_INVALID,
                  "not a well-formed JSON object (at byte " + std::to_string(scanner.position()) + ")");
  }
  return scanner.TakeMembers();
}

Result<std::string> ParseLocalCommRes(std::string_view text) {
  if (text.empty()) {
    return std::string();
  }
  const std::string option = llm_datadist::OPTION_LOCAL_COMM_RES;
  const Result<JsonMembers> members = ParseJsonObject(text);
  if (!members.ok()) {
    return Status(LLM_PARAM_INVALID, option + ": " + members.status().text());
  }
  const auto version = members.value().find("version");
  const bool given = version != members.value().end();
  if (!given || std::find(kKnownVersions.begin(), kKnownVersions.end(), version->second) == kKnownVersions.end()) {
    const std::string said = given ? "version " + version->second : std::string("no version");
    return Status(LLM_PARAM_INVALID, option + ": " + said + R"(, allowed: "1.0", "1.2", "1.3")");
  }
  return version->second.substr(1, version->second.size() - 2);
}

Result<PoolConfig> ParsePoolConfig(const char *option, std::string_view text) {
  const Result<JsonMembers> members = ParseJsonObject(text);
  const Result<PoolConfig> config = members.ok() ? PoolConfigOf(members.value()) : members.status();
  if (!config.ok()) {
    return Status(LLM_PARAM_INVALID, std::string(option) + ": '" + std::string(text) + "': " + config.status().text());
  }
  return config;
}

}  // namespace datadist
