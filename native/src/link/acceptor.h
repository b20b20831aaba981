// The front door of one endpoint as links use it.
//
// A connection says first what it is: HELLO (a link in the making), ATTACH (a data connection of one) or UNLINK.
#ifndef DATADIST_LINK_ACCEPTOR_H_
#define DATADIST_LINK_ACCEPTOR_H_

#include <memory>
#include <set>

#include "control/front_door.h"
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
  class LinkVisitor;
  void UnlinkOnLoop(const UnlinkRequest &request, uint64_t visit, uint32_t seq);
  void AnnounceOnLoop(const Link &link);
  ServerHandshake *FindOwnerOnLoop(const Attach &attach) const;

  const std::shared_ptr<LocalEndpoint> endpoint_;
  const std::shared_ptr<LinkTable> table_;
  const Admits admits_;

  // Owned by the loop thread.
  std::shared_ptr<FrontDoor> door_;
  std::set<ServerHandshake *> handshakes_;  // of the visitors that are here
};

}  // namespace datadist

#endif  // DATADIST_LINK_ACCEPTOR_H_
