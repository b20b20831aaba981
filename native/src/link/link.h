// One association of two endpoints: its control session, the path of the transfers that we initiate, the servers of
// those that the peer initiates, and what each side holds for the other.
//
//   Connecting ──> Established ──> Lost ──> Closed        (a table in link.cc says which steps are legal)
//
//   Connecting   made, not yet in the table
//   Established  transfers run, both ways
//   Lost         the peer is gone, silent or broke the protocol, or a transfer failed in a way that leaves the path in
//                doubt. Everything is shut and calls fail at once. The entry stays where our caller asked for the link,
//                so that unlink means something; where only the peer did, it goes: nobody here would ever take it out
//   Closed       out of the table; lives on only as long as a running call holds it
//
// Threads: Transfer and Unlink on the callers', ...OnLoop on the loop, the rest on any.
#ifndef DATADIST_LINK_LINK_H_
#define DATADIST_LINK_LINK_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/hmac.h"
#include "base/peer_process.h"
#include "control/address.h"
#include "control/frame.h"
#include "control/session.h"
#include "link/endpoint.h"
#include "link/turn_gate.h"
#include "llm_datadist/llm_datadist_ext.h"

namespace datadist {

class Link;
class LinkTable;

enum class LinkState : uint8_t { kConnecting, kEstablished, kLost, kClosed };

// What a handshake, of either side, ends in.
struct LinkParts {
  EndpointInfo peer;
  uint64_t caller_id = 0;  // what the caller took the peer's id for; on the server's side the peer's id
  std::string peer_address;
  LinkToken token{};
  std::shared_ptr<const PeerProcess> process;  // what the kernel says of the peer; none over TCP
  Route outgoing;                              // of the transfers that we initiate
  Route incoming;                              // of those that the peer does
  FrameSocket control;
  std::optional<Digest> streams;  // by which data connections prove that they are of this link
  std::vector<Fd> outgoing_streams;
  std::vector<Fd> incoming_streams;
  std::string comm_name;             // of a bilateral link
  int64_t comm_id = 0;               // of the one who dialled
  std::shared_ptr<Link> other_half;  // of a loopback link: ends with this one
};

// Zeros where no key was asked for: then the token alone says it.
StreamProof ProofOf(const std::optional<Digest> &streams, const Attach &attach);

enum class TransferDirection : uint8_t { kPull, kPush };

class Link final : public PeerCalls, public SessionHandler, public std::enable_shared_from_this<Link> {
 public:
  // Makes the op once the remote cache is known; Link fills in op.remote.
  using Planner = std::function<Result<TransferOp>(const RemoteTarget &)>;
  struct Part {
    CacheRef remote;
    Planner planner;
  };

  static std::shared_ptr<Link> Create(std::shared_ptr<LocalEndpoint> endpoint, std::weak_ptr<LinkTable> table,
                                      LinkParts parts);
  ~Link() override;

  uint64_t peer_id() const { return peer_.cluster_id; }
  uint64_t caller_id() const { return caller_id_; }
  const LinkToken &token() const { return token_; }
  bool HasToken(const LinkToken &token) const;  // in constant time
  const std::string &peer_address() const { return peer_address_; }
  const Incarnation &peer_incarnation() const { return peer_.incarnation; }
  // Whether a connection that is made now comes from the very endpoint at the other end: the kernel says that it is the
  // same process, or it knows the token, which only that endpoint was told.
  bool IsOf(const Incarnation &incarnation, const PeerProcess *process, const LinkToken &token) const;
  // Whether the connection has ended, though the loop may not have come to it yet: then the link is lost from now on.
  bool LoseIfGone();
  const std::string &comm_name() const { return comm_name_; }
  int64_t comm_id() const { return comm_id_; }
  // Whether its comm was found to be linked with every member, which lasts.
  bool comm_ok() const { return comm_ok_.load(); }
  void MarkCommOk() { comm_ok_.store(true); }
  // Whether the caller of this end asked for the link; otherwise only the peer's did so far.
  bool asked_here() const { return asked_here_.load(); }
  void MarkAskedHere() { asked_here_.store(true); }
  bool alive() const;
  llm_datadist::LinkReport Report() const;

  // Connecting -> Established; the link must be in the table, because the peer may use it from now on. The ESTABLISHED
  // of that number is answered under the lock, so that whoever hears of the link from the peer finds it established, and
  // nobody's request overtakes the answer.
  void Establish(std::optional<uint32_t> established_seq = std::nullopt);

  // Nothing moves before all of the parts are known and planned, so that a wrong one leaves no other half done.
  // LLM_TIMEOUT and LLM_FAILED leave the link lost, except where the call did not get its turn in time.
  // Two-sided, a pull by a request key tells the owner afterwards, which may consume the key.
  Status Transfer(TransferDirection direction, const std::vector<Part> &parts, Deadline deadline);

  // Waits for the running transfer, tells the peer, closes. LLM_TIMEOUT or LLM_UNLINK_FAILED leave the link as it is
  // or lost. A lost link cannot tell the peer itself: see UnlinkByDialling.
  Status Unlink(Deadline deadline);

  // Returns when nothing that the peer initiated touches our memory any more. The link must be closed or lost; not on
  // the loop.
  void WaitUntilServed();

  // Takes the link out of service for good, after the running transfer if that ends by the deadline.
  void CloseWhenIdle(Deadline deadline, const std::string &reason);
  void Close(const std::string &reason);

  // The peer dropped its half. `done` runs once ours is dropped, after the transfer that we may be running.
  void OnUnlinkedByPeerOnLoop(std::function<void()> done);

  // PeerCalls
  Status AskToRead(const TransferOp &op, Deadline deadline) override;

  // SessionHandler
  Status OnRequestOnLoop(const Frame &frame) override;
  void OnClosedOnLoop(CloseCause cause, const std::string &reason) override;

 private:
  Link(std::shared_ptr<LocalEndpoint> endpoint, std::weak_ptr<LinkTable> table, LinkParts parts);
  void OpenPaths(FrameSocket control, std::vector<Fd> outgoing_streams, std::vector<Fd> incoming_streams);

  bool MoveTo(LinkState next, const std::string &reason);
  void Lose(CloseCause cause, const std::string &reason);
  void CloseOtherHalf(const std::string &reason);
  void ShutPaths();
  Status CheckUsable() const;
  std::string Name() const;

  // A part of a transfer whose other side is known.
  struct PlannedPart {
    std::shared_ptr<const RemoteTarget> target;  // what op.remote points into
    bool remembered = false;                     // from an earlier transfer
    TransferOp op;
    uint64_t bytes = 0;
  };
  // A request and its answer; a status in the answer that is not ok becomes ours.
  template <typename Answer, typename Request>
  Result<Answer> Ask(MessageType type, const Request &request, MessageType answer, Deadline deadline);
  Status RunTransfer(TransferDirection direction, const std::vector<Part> &parts, Deadline deadline);
  Result<PlannedPart> PlanPart(const Part &part, Deadline deadline);
  Status VerifyPart(const TransferOp &op, Deadline deadline);
  Status CompareDigests(const DigestRequest &asked, const std::vector<uint32_t> &ours,
                        const std::vector<uint32_t> &theirs);
  Status MovePart(TransferDirection direction, const CacheRef &remote, const PlannedPart &planned, Deadline deadline);
  Result<std::shared_ptr<const RemoteTarget>> DescribeRemote(const CacheRef &ref, Deadline deadline);
  bool MayConsume(const CacheRef &remote) const;
  Status ConsumeKey(const CacheKey &key, const TransferOp &op, Deadline deadline);

  Status OnDescribeOnLoop(const Frame &frame);
  Result<NamedCache> FindForPeer(const CacheRef &ref) const;
  Status OnPushOnLoop(const Frame &frame);
  Status OnDigestOnLoop(const Frame &frame);
  Status ServeOnLoop(std::function<void()> work, std::function<void()> answer);
  Status OnConsumeOnLoop(const Frame &frame);
  Status OnUnlinkOnLoop(const Frame &frame);
  Status ServePush(const PushRequest &request);
  Digests ServeDigest(const DigestRequest &request);

  const std::shared_ptr<LocalEndpoint> endpoint_;
  const std::weak_ptr<LinkTable> table_;
  const EndpointInfo peer_;
  const uint64_t caller_id_;
  const std::string peer_address_;
  const LinkToken token_;
  const std::shared_ptr<const PeerProcess> process_;
  const Route outgoing_;
  const Route incoming_;
  const std::string comm_name_;
  const int64_t comm_id_;
  const std::shared_ptr<Link> other_half_;
  std::atomic<bool> asked_here_{false};
  std::atomic<bool> comm_ok_{false};
  std::shared_ptr<Session> session_;
  std::unique_ptr<DataPath> path_;
  std::unique_ptr<OwnerPath> owner_path_;

  TurnGate gate_;
  // By cache id, of lasting names; touched inside the gate only.
  std::map<int64_t, std::shared_ptr<const RemoteTarget>> described_;
  std::atomic<uint64_t> bytes_pulled_{0};
  std::atomic<uint64_t> bytes_pushed_{0};
  std::atomic<uint64_t> blocks_verified_{0};
  std::atomic<uint64_t> blocks_wrong_{0};

  mutable std::mutex mutex_;
  LinkState state_ = LinkState::kConnecting;  // guarded by mutex_
  std::string end_reason_;                    // guarded by mutex_
  bool serving_ = false;                      // guarded by mutex_; a request that takes a thread
  std::condition_variable served_;
};

// For a link whose own connection is gone: tells the peer over a fresh one. LLM_UNLINK_FAILED when it cannot be
// reached, LLM_TIMEOUT.
Status UnlinkByDialling(const LocalEndpoint &endpoint, const SocketAddress &address, const LinkToken &token,
                        Deadline deadline);

}  // namespace datadist

#endif  // DATADIST_LINK_LINK_H_
