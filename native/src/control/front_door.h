// The listeners of one endpoint and the connections that are nothing else yet: one place for what all that comes in has
// in common, which is that nobody has proven to be anybody.
//
//   accept ──> who is it? the kernel, or a key, or nobody may enter ──> frames to the Visitor ──> taken, or dropped
//
// A connection has until its deadline to become something; at most 64 are here at a time. When more come, one goes of
// the process or host that has the most, so that nobody can keep the others out.
#ifndef DATADIST_CONTROL_FRONT_DOOR_H_
#define DATADIST_CONTROL_FRONT_DOOR_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/log.h"
#include "base/status.h"
#include "control/address.h"
#include "control/event_loop.h"
#include "control/frame.h"
#include "control/key_ring.h"
#include "control/opening.h"

namespace datadist {

struct Caller {
  std::string name;                            // "process PID" or "ip:port"
  std::string source;                          // the process, or the host
  std::shared_ptr<const PeerProcess> process;  // whom the kernel names; none over TCP
  bool knows_key = false;                      // as it has proven

  // Somebody in particular, and not just anybody who was let in.
  bool IsKnown() const { return process != nullptr || knows_key; }
};

class Visit;

// What speaks for one connection until that is taken from the door. On the loop only; no waiting.
class Visitor {
 public:
  virtual ~Visitor() = default;

  // What may come next.
  virtual TypeSet legal() const = 0;
  // What of it may come over TCP without a key where there is one: messages that prove themselves.
  virtual TypeSet legal_unproven() const { return TypeSet(); }
  // Whether the caller has said what it wants: until then it goes first when room is made.
  virtual bool greeted() const = 0;
  // Whether a caller that leaves now does so for a good reason, which only it knows.
  virtual bool may_end() const { return false; }
  // Not ok: the connection is dropped, for that reason.
  virtual Status OnFrameOnLoop(const Frame &frame, Visit &visit) = 0;
};

// One connection at the door.
class Visit {
 public:
  Visit(EventLoop &loop, uint64_t id, Caller caller, Fd fd)
      : loop_(loop), id_(id), caller_(std::move(caller)), socket_(std::move(fd)) {}

  uint64_t id() const { return id_; }
  const Caller &caller() const { return caller_; }
  // By which data connections prove that they belong to this one; none where no key was asked for.
  const std::optional<Digest> &streams() const { return streams_; }

  // Messages at the door are small and alternate, so the socket's buffer has room for each; one that does not fit is the
  // fault of a caller that does not read.
  Status Send(MessageType type, uint32_t seq, const std::vector<uint8_t> &body);
  // Refuses. Returns `why`.
  Status Reject(uint32_t seq, const Status &why);
  // Nothing more may come, and that the caller leaves is no news.
  void Answered() { answered_ = true; }
  // From now on the caller has so long, instead of what was left.
  void GiveTime(std::chrono::milliseconds span) { time_ = span; }
  // The connection is the visitor's.
  FrameSocket Take();

 private:
  friend class FrontDoor;
  EventLoop &loop_;
  const uint64_t id_;
  Caller caller_;
  FrameSocket socket_;
  FrameReader reader_;
  std::optional<ServerOpening> opening_;
  std::optional<Digest> streams_;
  std::unique_ptr<Visitor> visitor_;
  std::optional<std::chrono::milliseconds> time_;
  bool answered_ = false;
  bool taken_ = false;
  uint64_t watch_ = 0;
  uint64_t timer_ = 0;
};

class FrontDoor : public std::enable_shared_from_this<FrontDoor> {
 public:
  using Receive = std::function<std::unique_ptr<Visitor>(const Caller &)>;

  // `receive` is called on the loop, until StopOnLoop.
  FrontDoor(std::shared_ptr<EventLoop> loop, Trust trust, Receive receive)
      : loop_(std::move(loop)), trust_(std::move(trust)), receive_(std::move(receive)) {}

  void StartOnLoop(Listeners listeners);
  // Closes the listeners and every connection that is still here.
  void StopOnLoop();

  // The visit, if it is still here.
  Visit *FindOnLoop(uint64_t id);

 private:
  // One of the two sockets that callers come by.
  struct Listener {
    Fd fd;
    uint64_t watch = 0;
    uint64_t pause_timer = 0;
  };
  void WatchOnLoop(Listener &listener, Fd fd);
  void OnListenerOnLoop(Listener &listener);
  void PauseOnLoop(Listener &listener);
  void AdmitOnLoop(Fd fd);
  void EvictOnLoop();
  void SetDeadlineOnLoop(Visit &visit, std::chrono::milliseconds span);
  void DropOnLoop(uint64_t id, const std::string &why);

  void OnReadableOnLoop(uint64_t id);
  Status ReadOnLoop(Visit &visit, bool &more);
  TypeSet LegalOnLoop(const Visit &visit) const;
  Status OnFrameOnLoop(Visit &visit, const Frame &frame);
  Status OnOpenOnLoop(Visit &visit, const Frame &frame);
  Status OnProveOnLoop(Visit &visit, const Frame &frame);

  const std::shared_ptr<EventLoop> loop_;
  const Trust trust_;
  const Receive receive_;

  // Owned by the loop thread.
  Listener tcp_;
  Listener local_;
  uint64_t last_id_ = 0;
  std::map<uint64_t, std::unique_ptr<Visit>> visits_;  // oldest first
  LogBudget log_budget_;
};

}  // namespace datadist

#endif  // DATADIST_CONTROL_FRONT_DOOR_H_
