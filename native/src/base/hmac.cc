#include "base/hmac.h"

#include <dlfcn.h>

#include <new>
#include <string>

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;

// As OpenSSL documents them, the same in 1.1 and 3: its headers are not needed to build.
struct Functions {
  const void *(*sha256)() = nullptr;
  unsigned char *(*hmac)(const void *method, const void *key, int key_size, const unsigned char *data, size_t size,
                         unsigned char *digest, unsigned int *digest_size) = nullptr;
};

struct Loaded {
  Functions functions;
  Status status;
};

template <typename Function>
bool Find(void *library, const char *name, Function *&function) {
  function = reinterpret_cast<Function *>(::dlsym(library, name));
  return function != nullptr;
}

// Never closed: OpenSSL has handlers of its own that run when the process ends.
Loaded Load() {
  constexpr const char *kNames[] = {"libcrypto.so.3", "libcrypto.so.1.1"};
  Loaded loaded;
  std::string reasons;
  for (const char *name : kNames) {
    void *const library = ::dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr && Find(library, "EVP_sha256", loaded.functions.sha256) &&
        Find(library, "HMAC", loaded.functions.hmac)) {
      return loaded;
    }
    const char *const why = ::dlerror();
    reasons += std::string(reasons.empty() ? "" : "; ") + (why != nullptr ? why : name);
  }
  loaded.status = Status(LLM_FAILED, "a key needs OpenSSL's libcrypto, version 3 or 1.1: " + reasons);
  return loaded;
}

// Never destroyed: links may outlive the static objects of the program.
const Loaded &TheLibrary() {
  static const auto *loaded = new Loaded(Load());
  return *loaded;
}

}  // namespace

Status LoadHmac() { return TheLibrary().status; }

Digest HmacSha256(const Digest &key, const void *data, size_t size) {
  const Functions &functions = TheLibrary().functions;
  Digest digest{};
  unsigned int digest_size = 0;
  if (functions.hmac(functions.sha256(), key.data(), static_cast<int>(key.size()),
                     static_cast<const unsigned char *>(data), size, digest.data(), &digest_size) == nullptr ||
      digest_size != digest.size()) {
    throw std::bad_alloc();
  }
  return digest;
}

Digest HmacOf(const Digest &key, std::string_view label, const std::vector<uint8_t> &data) {
  std::vector<uint8_t> whole(label.begin(), label.end());
  whole.insert(whole.end(), data.begin(), data.end());
  return HmacSha256(key, whole.data(), whole.size());
}

bool SameBytes(const uint8_t *a, const uint8_t *b, size_t size) {
  volatile uint8_t difference = 0;
  for (size_t i = 0; i < size; ++i) {
    difference = static_cast<uint8_t>(difference | (a[i] ^ b[i]));
  }
  return difference == 0;
}

}  // namespace datadist
