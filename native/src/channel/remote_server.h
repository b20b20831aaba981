// One server of a ChannelClient: the dial or the connection, and the requests that wait for it. On the loop only.
#ifndef DATADIST_CHANNEL_REMOTE_SERVER_H_
#define DATADIST_CHANNEL_REMOTE_SERVER_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "channel/client.h"
#include "channel/channel_dial.h"
#include "channel/frame_connection.h"

namespace datadist {

// A request as it crosses the wire.
struct OutgoingRequest {
  uint64_t id = 0;
  MessageType type = MessageType::kRenew;
  MessageType answer = MessageType::kRenewed;
  std::vector<uint8_t> body;
};

class RemoteServer : public FrameConnection::Handler {
 public:
  // What becomes of the requests is told to the Owner, which may destroy the server in OnUnusedOnLoop only.
  class Owner {
   public:
    virtual ~Owner() = default;
    virtual void OnAnswerOnLoop(ChannelAnswer answer) = 0;
    // Nothing waits for it, and its connection has ended.
    virtual void OnUnusedOnLoop(const std::string &name) = 0;
  };
  struct Setup {
    EventLoop &loop;
    SocketAddress address;
    Trust trust;
    uint16_t content_version;
    std::chrono::milliseconds idle;
  };

  RemoteServer(Setup setup, Owner &owner);
  ~RemoteServer() override;
  RemoteServer(const RemoteServer &) = delete;
  RemoteServer &operator=(const RemoteServer &) = delete;

  void SendOnLoop(OutgoingRequest request);
  // The request's time is over. May destroy the server.
  void ExpireOnLoop(uint64_t id);

  TypeSet LegalOnLoop() const override;
  Status OnFrameOnLoop(const Frame &frame) override;
  void OnEndedOnLoop(CloseCause cause, const Status &why) override;

 private:
  struct Pending {
    OutgoingRequest request;
    bool given_up = false;  // nobody waits any more, and its answer may still come
  };
  void DialOnLoop();
  void OnDialledOnLoop(Result<std::shared_ptr<FrameConnection>> dialled);
  void WriteOnLoop(Pending pending);
  void FailOnLoop(const NoAnswer &why);
  void OnCutOnLoop(const Status &why);
  bool IsWaitedFor() const;
  void RestOnLoop();

  const Setup setup_;
  const std::string name_;
  Owner &owner_;
  std::unique_ptr<ChannelDial> dial_;
  std::shared_ptr<FrameConnection> connection_;
  std::vector<Pending> waiting_;          // for the connection
  std::map<uint32_t, Pending> pending_;   // by seq on this connection
  uint32_t last_seq_ = 0;
  uint32_t cuts_ = 0;     // connections that ended by themselves, one after another, with no answer in between
  std::string last_cut_;  // why the last of them did
  uint64_t idle_timer_ = 0;
  uint64_t dial_timer_ = 0;
};

}  // namespace datadist

#endif  // DATADIST_CHANNEL_REMOTE_SERVER_H_
