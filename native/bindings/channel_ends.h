// What the ends of a channel have in common: who may be a peer, a thread that forks do not copy, an end before Python's.
#ifndef DATADIST_BINDINGS_CHANNEL_ENDS_H_
#define DATADIST_BINDINGS_CHANNEL_ENDS_H_

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "base/status.h"
#include "calls.h"
#include "channel_values.h"
#include "control/key_ring.h"

namespace datadist::bindings {

inline Trust ToTrust(const std::string &auth, bool insecure) {
  Trust trust{nullptr, insecure};
  if (!auth.empty()) {
    auto keys = KeyRing::FromFile(auth);
    if (!keys.ok()) {
      Raise(keys.status());
    }
    trust.keys = std::move(keys).value();
  }
  return trust;
}

// Its thread stayed in the parent: in a forked child nothing would ever be answered.
template <typename End>
End &Usable(End &end) {
  if (end.in_forked_child()) {
    throw std::runtime_error("this end of a channel belongs to the parent process; create one after fork()");
  }
  return end;
}

template <typename End>
std::shared_ptr<End> Made(Result<std::unique_ptr<End>> made) {
  if (!made.ok()) {
    Raise(made.status());
  }
  std::shared_ptr<End> end = std::move(made).value();
  AddExitEndpoint(std::weak_ptr<void>(end), [](void *raw) { static_cast<End *>(raw)->Close(); });
  return end;
}

template <typename End>
void Close(End &self) {
  End &end = Usable(self);
  (void)WithoutGil([&] {
    end.Close();
    return Status::Ok();
  });
}

}  // namespace datadist::bindings

#endif  // DATADIST_BINDINGS_CHANNEL_ENDS_H_
