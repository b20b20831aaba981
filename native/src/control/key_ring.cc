#include "control/key_ring.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <optional>
#include <string_view>
#include <utility>

#include "base/fd.h"
#include "base/log.h"
#include "base/socket_io.h"

namespace datadist {
namespace {

using llm_datadist::LLM_PARAM_INVALID;

constexpr size_t kMaxKeyFile = 4096;
constexpr char kKeyFileForm[] = "one or two lines of 64 hexadecimal digits";

// As PostgreSQL has it for private keys: root's may be readable by a group, so that a service can be given one.
Status CheckMode(const struct stat &file) {
  const bool of_root = file.st_uid == 0;
  const mode_t forbidden = of_root ? S_IWGRP | S_IXGRP | S_IRWXO : S_IRWXG | S_IRWXO;
  if (!S_ISREG(file.st_mode)) {
    return Status(LLM_PARAM_INVALID, "not a regular file");
  }
  if (!of_root && file.st_uid != ::geteuid()) {
    return Status(LLM_PARAM_INVALID, "it belongs to user " + std::to_string(file.st_uid) + ", allowed: user " +
                                         std::to_string(::geteuid()) + " or root");
  }
  if ((file.st_mode & forbidden) != 0) {
    char mode[8];
    std::snprintf(mode, sizeof(mode), "%04o", static_cast<unsigned>(file.st_mode & 07777U));
    return Status(LLM_PARAM_INVALID, std::string("others may use it: mode ") + mode + ", allowed: " +
                                         (of_root ? "0640" : "0600") + " or less");
  }
  return Status::Ok();
}

Result<std::string> ReadWhole(int fd) {
  std::string text(kMaxKeyFile + 1, '\0');
  size_t filled = 0;
  while (filled < text.size()) {
    const ssize_t size = ::read(fd, text.data() + filled, text.size() - filled);
    if (size < 0 && errno == EINTR) {
      continue;
    }
    if (size < 0) {
      return Status(LLM_PARAM_INVALID, ErrnoText(errno));
    }
    if (size == 0) {
      break;
    }
    filled += static_cast<size_t>(size);
  }
  text.resize(filled);
  return text;
}

std::optional<uint8_t> HexDigit(char digit) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  const size_t value = kDigits.find(static_cast<char>(digit >= 'A' && digit <= 'F' ? digit - 'A' + 'a' : digit));
  return value == std::string_view::npos ? std::nullopt : std::optional<uint8_t>(static_cast<uint8_t>(value));
}

std::optional<Key> ParseKey(std::string_view line) {
  Key key;
  if (line.size() != 2 * key.secret.size()) {
    return std::nullopt;
  }
  for (size_t i = 0; i < key.secret.size(); ++i) {
    const auto high = HexDigit(line[2 * i]);
    const auto low = HexDigit(line[2 * i + 1]);
    if (!high.has_value() || !low.has_value()) {
      return std::nullopt;
    }
    key.secret[i] = static_cast<uint8_t>(*high * 16U + *low);
  }
  const Digest named = HmacOf(key.secret, "datadist key id");
  std::copy_n(named.begin(), key.id.size(), key.id.begin());
  return key;
}

// Never says what a line holds: it may be a key with a slip of the pen.
Result<std::vector<Key>> ParseKeys(std::string_view text) {
  std::vector<Key> keys;
  if (text.size() > kMaxKeyFile) {
    return Status(LLM_PARAM_INVALID, "more than " + std::to_string(kMaxKeyFile) + " bytes, allowed: " + kKeyFileForm);
  }
  for (size_t number = 1; !text.empty(); ++number) {
    const size_t end = std::min(text.find('\n'), text.size());
    std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    while (!line.empty() && (line.back() == '\r' || line.back() == ' ')) {
      line.remove_suffix(1);
    }
    if (line.empty() || line.front() == '#') {
      continue;
    }
    const std::optional<Key> key = ParseKey(line);
    if (!key.has_value() || keys.size() == kMaxKeys) {
      return Status(LLM_PARAM_INVALID, "line " + std::to_string(number) +
                                           (key.has_value() ? " is a third key" : " is no key") +
                                           ", allowed: " + kKeyFileForm);
    }
    keys.push_back(*key);
  }
  if (keys.empty()) {
    return Status(LLM_PARAM_INVALID, std::string("no key in it, allowed: ") + kKeyFileForm);
  }
  return keys;
}

}  // namespace

Result<std::shared_ptr<KeyRing>> KeyRing::FromFile(const std::string &path) {
  if (Status loaded = LoadHmac(); !loaded.ok()) {
    return loaded;
  }
  const std::shared_ptr<KeyRing> ring(new KeyRing(path));
  const std::lock_guard<std::mutex> lock(ring->mutex_);
  ring->ChangedLocked();
  if (Status status = ring->ReadLocked(); !status.ok()) {
    return status;
  }
  return ring;
}

Status KeyRing::ReadLocked() {
  const auto wrong = [&](const std::string &why) {
    return Status(LLM_PARAM_INVALID, "key file '" + path_ + "': " + why);
  };
  // O_NONBLOCK: a FIFO must not hold us up before it is refused.
  const Fd fd(::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat file {};
  if (!fd || ::fstat(fd.get(), &file) != 0) {
    return wrong(ErrnoText(errno));
  }
  if (Status status = CheckMode(file); !status.ok()) {
    return wrong(status.text());
  }
  const Result<std::string> text = ReadWhole(fd.get());
  if (!text.ok()) {
    return wrong(text.status().text());
  }
  Result<std::vector<Key>> keys = ParseKeys(text.value());
  if (!keys.ok()) {
    return wrong(keys.status().text());
  }
  keys_ = std::move(keys).value();
  return Status::Ok();
}

// A file that is gone for a moment is one that is being replaced.
bool KeyRing::ChangedLocked() {
  struct stat now {};
  if (::stat(path_.c_str(), &now) != 0) {
    return false;
  }
  const struct stat before = std::exchange(seen_, now);
  return now.st_ino != before.st_ino || now.st_dev != before.st_dev || now.st_size != before.st_size ||
         now.st_mode != before.st_mode || now.st_mtim.tv_sec != before.st_mtim.tv_sec ||
         now.st_mtim.tv_nsec != before.st_mtim.tv_nsec;
}

std::vector<Key> KeyRing::Keys() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (ChangedLocked()) {
    if (const Status status = ReadLocked(); !status.ok()) {
      Log(LogLevel::kError, "the keys read before stay in use: " + status.text());
    }
  }
  return keys_;
}

}  // namespace datadist
