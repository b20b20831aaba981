// The listeners of one endpoint and the connections that are not links yet.
//
// A connection says first what it is: HELLO (a link in the making), ATTACH (a data connection of one) or UNLINK. It has
// until its deadline to become that; at most 64 of them exist at a time. When more come, one goes of the process or host
// that has the most, so that nobody can keep the others out.
#ifndef DATADIST_LINK_ACCEPTOR_H_
#define DATADIST_LINK_ACCEPTOR_H_

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/log.h"
#include "control/address.h"
#include "link/server_handshake.h"

namespace datadist {

class Acceptor : public std::enable_shared_from_this<Acceptor> {
 public:
  Acceptor(std::shared_ptr<LocalEndpoint> endpoint, std::shared_ptr<LinkTable> table, Admits admits = Admits::kAll)
      : endpoint_(std::move(endpoint)), table_(std::move(table)), admits_(admits) {}

  void StartOnLoop(Listeners listeners);
  // Closes the listeners and every connection that is not a link yet.
  void StopOnLoop();

 private:
  struct Incoming {
    Incoming(Fd connection, std::string name, std::string comes_from, ServerHandshake steps)
        : fd(std::move(connection)),
          peer(std::move(name)),
          source(std::move(comes_from)),
          handshake(std::move(steps)) {}
    Fd fd;
    std::string peer;
    std::string source;  // process or host
    ServerHandshake handshake;
    FrameReader reader;
    uint64_t watch = 0;
    uint64_t timer = 0;
    bool answered = false;  // nothing more may come, and that the peer leaves is no news
  };
  using Key = uint64_t;

  // One of the two sockets that clients come by.
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
  void SetDeadlineOnLoop(Key key, Incoming &incoming, std::chrono::milliseconds span);
  void DropOnLoop(Key key, const std::string &why);

  void OnReadableOnLoop(Key key);
  Status ReadOnLoop(Key key, Incoming &incoming, bool &more);
  Status OnFrameOnLoop(Key key, Incoming &incoming, const Frame &frame);
  Status OnHandshakeOnLoop(Key key, Incoming &incoming, const Frame &frame);
  Status OnAttachOnLoop(Key key, Incoming &incoming, const Frame &frame);
  Status OnUnlinkOnLoop(Key key, Incoming &incoming, const Frame &frame);
  Status OnEstablishedOnLoop(Key key, Incoming &incoming, const Frame &frame);

  const std::shared_ptr<LocalEndpoint> endpoint_;
  const std::shared_ptr<LinkTable> table_;
  const Admits admits_;

  // Owned by the loop thread.
  Listener tcp_;
  Listener local_;
  Key last_key_ = 0;
  std::map<Key, std::unique_ptr<Incoming>> incoming_;  // oldest first
  LogBudget log_budget_;
};

}  // namespace datadist

#endif  // DATADIST_LINK_ACCEPTOR_H_
