// The keys that clusters on different hosts share: who knows one of them is let in.
//
// A key file has a key per line, 64 hexadecimal digits, two lines at most; empty lines and lines that begin with # mean
// nothing. Two ends need one key in common, so a key is changed without an end to service: add the new one everywhere,
// then take the old one out everywhere. The file is read again when it has changed.
#ifndef DATADIST_CONTROL_KEY_RING_H_
#define DATADIST_CONTROL_KEY_RING_H_

#include <sys/stat.h>

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/hmac.h"
#include "base/status.h"

namespace datadist {

constexpr size_t kMaxKeys = 2;
// Names a key without telling anything of it.
using KeyId = std::array<uint8_t, 8>;

struct Key {
  KeyId id{};
  Digest secret{};
};

class KeyRing {
 public:
  // LLM_PARAM_INVALID, saying what is wrong with the file: it is missing, others may read it, it holds no key. LLM_FAILED
  // where there is no libcrypto.
  static Result<std::shared_ptr<KeyRing>> FromFile(const std::string &path);

  // As the file has them now; as it had them last where it cannot be used any more, which is logged once. Any thread.
  std::vector<Key> Keys();

 private:
  explicit KeyRing(std::string path) : path_(std::move(path)) {}
  Status ReadLocked();
  bool ChangedLocked();

  const std::string path_;
  std::mutex mutex_;     // guards all below
  struct stat seen_ {};  // the file as it was looked at last, usable or not
  std::vector<Key> keys_;
};

// Whom an endpoint takes for a peer over TCP, where the kernel does not say who is there.
struct Trust {
  std::shared_ptr<KeyRing> keys;  // whoever knows a key; none: see insecure
  bool insecure = false;          // anybody
};

}  // namespace datadist

#endif  // DATADIST_CONTROL_KEY_RING_H_
