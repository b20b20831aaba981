#include "control/opening.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <utility>

#include "base/log.h"
#include "base/random.h"
#include "control/message_fields.h"
#include "control/messages.h"

namespace datadist {
namespace {

using llm_datadist::LLM_FAILED;
using llm_datadist::LLM_LINK_FAILED;

// No label begins another one.
constexpr char kServerProof[] = "datadist proof of the server";
constexpr char kClientProof[] = "datadist proof of the client";
constexpr char kSession[] = "datadist session";
constexpr char kToServer[] = "datadist frames to the server";
constexpr char kToClient[] = "datadist frames to the client";
constexpr char kStreams[] = "datadist data connections";

using Nonce = std::array<uint8_t, 16>;

struct Open {
  VersionRange versions;
  Nonce nonce{};
  std::vector<KeyId> key_ids;
};

std::vector<uint8_t> Joined(const std::vector<uint8_t> &a, const std::vector<uint8_t> &b) {
  std::vector<uint8_t> both = a;
  both.insert(both.end(), b.begin(), b.end());
  return both;
}

// Everything that the two ends have said up to the first proof, and the proofs and keys that follow from it.
struct Transcript {
  Transcript(const Digest &secret, const std::vector<uint8_t> &open, const std::vector<uint8_t> &opened_head)
      : said(Joined(open, opened_head)),
        server_proof(HmacOf(secret, kServerProof, said)),
        client_proof(HmacOf(secret, kClientProof, said)) {
    const Digest session = HmacOf(secret, kSession, said);
    keys = SessionKeys{HmacOf(session, kToServer), HmacOf(session, kToClient), HmacOf(session, kStreams)};
  }
  const std::vector<uint8_t> said;
  const Digest server_proof;
  const Digest client_proof;
  SessionKeys keys;
};

Result<Open> DecodeOpen(const std::vector<uint8_t> &body) {
  const Result<VersionRange> versions = DecodeVersionRange(body);
  if (!versions.ok()) {
    return versions.status();
  }
  if (Status status = CheckVersions(versions.value()); !status.ok()) {
    return status;
  }
  Reader reader(body.data(), body.size());
  Open open{versions.value(), {}, {}};
  reader.U32();  // the versions
  Get(reader, open.nonce);
  const uint8_t count = reader.U8();
  if (!reader.ok() || count == 0 || count > kMaxKeys) {
    return Malformed("OPEN");
  }
  open.key_ids.resize(count);
  for (KeyId &id : open.key_ids) {
    Get(reader, id);
  }
  if (!reader.Finished()) {
    return Malformed("OPEN");
  }
  return open;
}

const Key *FindKey(const std::vector<Key> &keys, const KeyId &id) {
  const auto it = std::find_if(keys.begin(), keys.end(), [&](const Key &key) { return key.id == id; });
  return it == keys.end() ? nullptr : &*it;
}

}  // namespace

Result<std::vector<uint8_t>> ClientOpening::Open() {
  const Result<Nonce> nonce = RandomBytes();
  if (!nonce.ok()) {
    return nonce.status();
  }
  Writer writer;
  writer.U16(kProtocolVersion);
  writer.U16(kProtocolVersion);
  Put(writer, nonce.value());
  writer.U8(static_cast<uint8_t>(keys_.size()));
  for (const Key &key : keys_) {
    Put(writer, key.id);
  }
  open_ = writer.Take();
  return open_;
}

Result<std::vector<uint8_t>> ClientOpening::OnOpened(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  KeyId id{};
  Nonce nonce{};
  Digest proof{};
  Get(reader, id);
  Get(reader, nonce);
  Get(reader, proof);
  const Key *const key = FindKey(keys_, id);
  if (!reader.Finished() || key == nullptr) {
    return Malformed("OPENED");
  }
  const auto head_size = static_cast<std::ptrdiff_t>(id.size() + nonce.size());
  const Transcript transcript(key->secret, open_, std::vector<uint8_t>(body.begin(), body.begin() + head_size));
  if (!SameBytes(proof, transcript.server_proof)) {
    return Status(LLM_LINK_FAILED, "who listens there does not know the key that it names");
  }
  session_ = transcript.keys;
  return std::vector<uint8_t>(transcript.client_proof.begin(), transcript.client_proof.end());
}

Result<std::vector<uint8_t>> ServerOpening::OnOpen(const std::vector<uint8_t> &body) {
  const Result<struct Open> open = DecodeOpen(body);
  if (!open.ok()) {
    return open.status();
  }
  const auto &ids = open.value().key_ids;
  const auto common =
      std::find_if(keys_.begin(), keys_.end(), [&](const Key &key) { return std::count(ids.begin(), ids.end(), key.id); });
  if (common == keys_.end()) {
    return Status(LLM_LINK_FAILED, "the two ends have no key in common: their key files differ");
  }
  const Result<Nonce> nonce = RandomBytes();
  if (!nonce.ok()) {
    return nonce.status();
  }
  Writer writer;
  Put(writer, common->id);
  Put(writer, nonce.value());
  std::vector<uint8_t> opened = writer.Take();
  const Transcript transcript(common->secret, body, opened);
  expected_proof_ = transcript.client_proof;
  session_ = transcript.keys;
  opened.insert(opened.end(), transcript.server_proof.begin(), transcript.server_proof.end());
  return opened;
}

Status ServerOpening::OnProve(const std::vector<uint8_t> &body) {
  Reader reader(body.data(), body.size());
  Digest proof{};
  Get(reader, proof);
  if (!reader.Finished()) {
    return Malformed("PROVE");
  }
  if (!expected_proof_.has_value() || !SameBytes(proof, *expected_proof_)) {
    return Status(LLM_FAILED, "the client does not know the key that it names");
  }
  return Status::Ok();
}

Status NotTrusted(const std::string &note) {
  return Status(LLM_LINK_FAILED, "over TCP nobody says who is there: give both ends a key (auth), or let in anybody "
                                 "(insecure)" + (note.empty() ? "" : "; " + note));
}

Status Refusal(const Frame &reject) {
  const Result<Reject> decoded = Decode<Reject>(reject.body);
  return decoded.ok() ? Status(decoded.value().status.code(), "refused by the peer: " + decoded.value().status.text())
                      : decoded.status();
}

namespace {

Status OpenByKey(OpenConnection &connection, std::vector<Key> keys, Deadline deadline) {
  ClientOpening opening(std::move(keys));
  const Result<std::vector<uint8_t>> open = opening.Open();
  if (!open.ok()) {
    return open.status();
  }
  FrameSocket &socket = connection.socket;
  if (Status sent = SendFrame(socket, MessageType::kOpen, 0, open.value(), deadline); !sent.ok()) {
    return sent;
  }
  const Result<Frame> opened = RecvFrame(socket, TypeSet(MessageType::kOpened, MessageType::kReject), deadline);
  if (!opened.ok()) {
    return opened.status();
  }
  if (opened.value().type == MessageType::kReject) {
    return Refusal(opened.value());
  }
  const Result<std::vector<uint8_t>> proof = opening.OnOpened(opened.value().body);
  if (!proof.ok()) {
    return proof.status();
  }
  if (Status sent = SendFrame(socket, MessageType::kProve, 0, proof.value(), deadline); !sent.ok()) {
    return sent;
  }
  socket.out = FrameSeal(opening.session().to_server);
  socket.in = FrameSeal(opening.session().to_client);
  connection.streams = opening.session().streams;
  return Status::Ok();
}

}  // namespace

Result<Listeners> ListenOpen(const SocketAddress &address, const Trust &trust) {
  if (!address.IsLoopback() && trust.keys == nullptr) {
    if (!trust.insecure) {
      return Invalid(address.ToString() + " can be reached by other hosts, which needs a key (auth) or leave to let in "
                                          "anybody (insecure); allowed without: loopback addresses");
    }
    static std::atomic<bool> warned{false};
    if (!warned.exchange(true)) {
      Log(LogLevel::kWarning, "insecure: whoever can connect to " + address.ToString() +
                                  " may link, and read or write what peers may");
    }
  }
  return Listen(address);
}

Result<OpenConnection> DialOpen(const SocketAddress &address, const Trust &trust, Deadline deadline) {
  Result<Connection> dialled = Dial(address, deadline);
  if (!dialled.ok()) {
    return dialled.status();
  }
  OpenConnection connection{FrameSocket(std::move(dialled.value().fd)), std::move(dialled.value().process), {}};
  if (connection.process != nullptr || IsOpenToAll(trust)) {
    return connection;
  }
  if (trust.keys == nullptr) {
    return NotTrusted(dialled.value().note);
  }
  if (Status status = OpenByKey(connection, trust.keys->Keys(), deadline); !status.ok()) {
    return status;
  }
  return connection;
}

}  // namespace datadist
