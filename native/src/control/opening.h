// How two ends that share a key open a connection over TCP, before anything else is said on it: each proves to the other
// that it knows the key, and every frame from then on has a seal.
//
//   client                                       server
//   OPEN    versions, nonce, key ids ──────────>
//           <───── OPENED  key id, nonce, proof         (or REJECT)
//   PROVE   proof ─────────────────────────────>
//
// A proof is an HMAC of all that was said before it, with the role of its maker: neither the other's nor one of another
// connection will do. No clock is part of it. The bytes of KV caches are neither sealed nor secret.
#ifndef DATADIST_CONTROL_OPENING_H_
#define DATADIST_CONTROL_OPENING_H_

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/deadline.h"
#include "base/status.h"
#include "control/address.h"
#include "control/frame.h"
#include "control/key_ring.h"

namespace datadist {

// What the two ends of one opened connection have, and nobody else.
struct SessionKeys {
  Digest to_server{};
  Digest to_client{};
  Digest streams{};  // by which data connections prove that they belong to this one
};

// Neither class does I/O.
class ClientOpening {
 public:
  explicit ClientOpening(std::vector<Key> keys) : keys_(std::move(keys)) {}

  // The body of OPEN.
  Result<std::vector<uint8_t>> Open();
  // The body of OPENED -> that of PROVE, after which the seals hold. LLM_LINK_FAILED for a server that does not know the
  // key.
  Result<std::vector<uint8_t>> OnOpened(const std::vector<uint8_t> &body);
  const SessionKeys &session() const { return session_; }

 private:
  const std::vector<Key> keys_;
  std::vector<uint8_t> open_;
  SessionKeys session_;
};

class ServerOpening {
 public:
  explicit ServerOpening(std::vector<Key> keys) : keys_(std::move(keys)) {}

  // The body of OPEN -> that of OPENED. LLM_LINK_FAILED, to be told to the client: no key in common, another version.
  Result<std::vector<uint8_t>> OnOpen(const std::vector<uint8_t> &body);
  // The body of PROVE. Ok: the client knows the key, and the seals hold.
  Status OnProve(const std::vector<uint8_t> &body);
  const SessionKeys &session() const { return session_; }

 private:
  const std::vector<Key> keys_;
  std::optional<Digest> expected_proof_;
  SessionKeys session_;
};

struct OpenConnection {
  FrameSocket socket;
  std::shared_ptr<const PeerProcess> process;  // none over TCP
  std::optional<Digest> streams;               // of a connection that was opened by a key
};

// Listens, as Listen. LLM_PARAM_INVALID for an address that other hosts can reach, where `trust` says neither whom to let
// in nor that anybody may come; the latter is warned of once.
Result<Listeners> ListenOpen(const SocketAddress &address, const Trust &trust);

// Dials, and opens by key where the kernel does not say who is there. LLM_LINK_FAILED where `trust` lets nobody in over
// TCP, or the two ends do not agree; else as Dial.
Result<OpenConnection> DialOpen(const SocketAddress &address, const Trust &trust, Deadline deadline);

// Whether anybody may enter over TCP.
inline bool IsOpenToAll(const Trust &trust) { return trust.keys == nullptr && trust.insecure; }

// Why nobody enters over TCP where there is neither a key nor leave to do without one.
Status NotTrusted(const std::string &note);

// The status in a REJECT, as the caller is told of it.
Status Refusal(const Frame &reject);

}  // namespace datadist

#endif  // DATADIST_CONTROL_OPENING_H_
