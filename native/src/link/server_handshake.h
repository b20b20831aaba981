// The accepting end of one link in the making: what to answer to each message of the client. No I/O and no waiting; the
// Acceptor, which owns it, does both. On the loop only.
//
//   AwaitHello ──HELLO──> AwaitReady ──READY──> AwaitEstablished (data connections attach) ──ESTABLISHED──> Done
//        └──HELLO of our own endpoint──> Done: the client sees who answered, and links by itself
#ifndef DATADIST_LINK_SERVER_HANDSHAKE_H_
#define DATADIST_LINK_SERVER_HANDSHAKE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "control/frame.h"
#include "control/front_door.h"
#include "link/endpoint.h"
#include "link/link_table.h"

namespace datadist {

// Whom a listener is for: every client, or members of comms only.
enum class Admits : uint8_t { kAll, kComms };

class ServerHandshake {
 public:
  ServerHandshake(std::shared_ptr<LocalEndpoint> endpoint, std::shared_ptr<LinkTable> table, Admits admits,
                  const Caller &caller);

  TypeSet legal() const;
  bool greeted() const { return state_ != State::kAwaitHello; }
  // Whether a client that leaves now does so for a good reason, which only it knows.
  bool may_end() const { return may_end_; }
  // What the client says that it has left; of meaning once greeted.
  std::chrono::milliseconds client_patience() const { return client_patience_; }

  // The body of HELLO -> that of WELCOME; of READY -> that of the answer's READY. Not ok: refuse with that status.
  // `streams` is what the opening left for data connections.
  Result<std::vector<uint8_t>> OnHello(const std::vector<uint8_t> &body, const std::optional<Digest> &streams);
  Result<std::vector<uint8_t>> OnReady(const std::vector<uint8_t> &body);

  // Whether this link waits for that data connection.
  bool Wants(const Attach &attach) const;
  void TakeStream(const Attach &attach, Fd stream);

  // ESTABLISHED: makes the link of `control` and puts it into the table, not yet established.
  Result<std::shared_ptr<Link>> Finish(FrameSocket control);

 private:
  enum class State : uint8_t { kAwaitHello, kAwaitReady, kAwaitEstablished, kDone };
  Status Admit(const Hello &hello);
  Status CheckClient(const Hello &hello) const;
  Status CheckComm(const std::string &name, int64_t comm_id, const EndpointInfo &client) const;
  std::shared_ptr<Link> FindAbandoned(const std::string &comm_name, const EndpointInfo &client) const;
  Status CheckFree(const EndpointInfo &client) const;
  void NoteRefusal(const Hello &hello, const Status &why) const;

  const std::shared_ptr<LocalEndpoint> endpoint_;
  const std::shared_ptr<LinkTable> table_;
  const Admits admits_;
  State state_ = State::kAwaitHello;
  bool may_end_ = false;
  bool force_link_ = false;  // as the client said
  LinkToken replaced_{};     // the same
  std::chrono::milliseconds client_patience_{0};
  LinkTable::Reservation reservation_;
  LinkParts parts_;
};

}  // namespace datadist

#endif  // DATADIST_LINK_SERVER_HANDSHAKE_H_
