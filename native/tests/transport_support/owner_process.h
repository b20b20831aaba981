// An Owner in a second process: this test binary, started anew with --owner, driven over a socket pair.
#ifndef DATADIST_TESTS_TRANSPORT_SUPPORT_OWNER_PROCESS_H_
#define DATADIST_TESTS_TRANSPORT_SUPPORT_OWNER_PROCESS_H_

#include <vector>

#include "base/bytes.h"
#include "base/fd.h"
#include "transport_support/owner.h"

namespace datadist::test {

class OwnerProcess final : public Owner {
 public:
  OwnerProcess();
  ~OwnerProcess() override;  // kills it if it still lives

  RemoteCache AddCache(const CacheShape &shape, uint64_t seed) override;
  void UnregisterAndReuse(int64_t cache_id) override;
  std::vector<uint8_t> Bytes(int64_t cache_id) override;
  bool CanariesIntact(int64_t cache_id) override;
  std::shared_ptr<const PeerProcess> Process() override;
  uint16_t Listen() override;
  void Serve(size_t connections, std::chrono::milliseconds max_request) override;
  Status Read(const PushRequest &request) override;

  pid_t pid() const { return pid_; }
  void Stop();   // SIGSTOP; returns when it has stopped
  void Kill();   // SIGKILL; returns when it is gone

 private:
  std::vector<uint8_t> Call(const Writer &request);
  Fd channel_;
  pid_t pid_ = -1;
  std::mutex call_mutex_;
};

// main() of a test that starts an OwnerProcess: serves as the owner when started as one, else runs the tests.
int TestMain(int argc, char **argv);

}  // namespace datadist::test

#endif  // DATADIST_TESTS_TRANSPORT_SUPPORT_OWNER_PROCESS_H_
