// What this engine offers beside the LLM-DataDist API: reasons in words, link facts, options of its own.
#ifndef LLM_DATADIST_LLM_DATADIST_EXT_H_
#define LLM_DATADIST_LLM_DATADIST_EXT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "llm_datadist/llm_datadist.h"

namespace llm_datadist {

// ---- options of this engine, given to Initialize beside the documented ones ----
// "auto" (default), "local", "cma" or "tcp": which transport links use. A forced transport that cannot reach the peer
// fails the link with LLM_LINK_FAILED.
constexpr char OPTION_TRANSPORT[] = "datadist.Transport";
// Threads that share the copying of one large transfer, the caller's included: 1..64, default 2.
constexpr char OPTION_TRANSFER_THREADS[] = "datadist.TransferThreads";
// Data connections per direction of a tcp link: 1..16, default 2; of two ends the smaller number counts.
constexpr char OPTION_TCP_STREAMS[] = "datadist.TcpStreams";
// A link is lost after three heartbeat intervals of silence: 10..60000 ms, default 2000.
constexpr char OPTION_HEARTBEAT_MS[] = "datadist.HeartbeatMs";
// "1": ask for huge pages under memory once it is registered, which makes cma two to three times as fast; default "0".
// Registration does not wait for it: see WaitForHugePages.
constexpr char OPTION_HUGE_PAGES[] = "datadist.HugePages";
// What peers may do with the caches of this endpoint: "read_write" (default, as documented), "read", "none", "granted"
// (read nothing, write only what GrantWrites grants them) or "read_granted" (read, and write only that). A peer's
// transfer that is not allowed fails with LLM_PARAM_INVALID, at the peer.
constexpr char OPTION_PEER_ACCESS[] = "datadist.PeerAccess";
// Peers on this host that are of this process's user need no key: the kernel says who they are. Everybody else is asked
// for one that is in this file (one or two lines of 64 hexadecimal digits; mode 0600, or 0640 and root's); both ends need
// one in common. `vllm-datadist key FILE` makes one. Else the environment variable DATADIST_AUTH_KEY_FILE says it.
constexpr char OPTION_AUTH_KEY_FILE[] = "datadist.AuthKeyFile";
// "1": whoever can connect may link, unasked; default "0". Else the environment variable DATADIST_INSECURE says it.
// To listen on anything but a loopback address needs this or a key.
constexpr char OPTION_INSECURE[] = "datadist.Insecure";
// "log" or "fail": after each transfer the owner of the remote cache is asked for a digest (CRC-32C) of each block, which
// must be that of our own; "off" is the default. A wrong block is logged, or fails the transfer with
// LLM_KV_CACHE_NOT_EXIST. Finds what changed while it was read and what was damaged on its way, not what was forged; a
// transfer that writes a byte twice is not checked.
constexpr char OPTION_VERIFY[] = "datadist.Verify";
// The documented limits, raisable: links (default 512; no limit with OPTION_LOCAL_COMM_RES of version 1.3), addresses
// per registration (240), registered device bytes (50 GB) and host bytes (20 GB), GB = 1024^3.
constexpr char OPTION_MAX_LINKS[] = "datadist.MaxLinks";
constexpr char OPTION_MAX_ADDRS_PER_CACHE[] = "datadist.MaxAddrsPerCache";
// Addresses in all registrations together: unlimited here, 240 in the Python API, which documents that.
constexpr char OPTION_MAX_REGISTERED_ADDRS[] = "datadist.MaxRegisteredAddrs";
constexpr char OPTION_MAX_DEVICE_BYTES[] = "datadist.MaxDeviceBytes";
constexpr char OPTION_MAX_HOST_BYTES[] = "datadist.MaxHostBytes";

// Why the last call on this thread failed: "CALL: LLM_PARAM_INVALID (0x5010B005): " and option or field, value, allowed
// range, peer. Empty after a success. Valid until the thread's next call. It is logged as well, at ERROR, at most ten
// times a second.
LLM_DATADIST_API const char *GetLastErrorText();

// "LLM_PARAM_INVALID" for 0x5010B005 and so on; "LLM_UNKNOWN" for other values.
LLM_DATADIST_API const char *GetStatusName(Status status);

// The port the listener is bound to: what the system chose when OPTION_LISTEN_IP_INFO said port 0. LLM_FAILED when not
// initialised, LLM_FEATURE_NOT_ENABLED when not listening.
LLM_DATADIST_API Status QueryListenPort(const LlmDataDist &datadist, uint16_t &port);

struct LinkReport {
  bool alive = false;             // false: lost, waiting for unlink or relink
  std::string transport;          // "local", "cma" or "tcp": what transfers that we initiate use
  std::string transport_reason;   // why not a faster one; empty when it is the fastest
  std::string peer;               // "ip:port", or "process PID" where one of this host linked to us
  uint64_t bytes_pulled = 0;
  uint64_t bytes_pushed = 0;
  uint64_t blocks_verified = 0;   // with OPTION_VERIFY
  uint64_t blocks_wrong = 0;      // of these
};

// LLM_NOT_YET_LINK when there is no link to that cluster.
LLM_DATADIST_API Status QueryLink(const LlmDataDist &datadist, uint64_t cluster_id, LinkReport &report);

struct HugePagesReport {
  bool allowed = false;     // false: nothing was asked for, as the option is off or the machine says "never"
  uint64_t bytes = 0;       // the whole huge pages of what was registered
  uint64_t huge_bytes = 0;  // of these, known to be huge now; what nobody has touched yet is not counted
  double seconds = 0;       // that it took in the background
};

enum class PeerAccess : uint8_t { kNone, kRead, kReadWrite, kGranted, kReadGranted };

// What peers may do with one cache, never more than OPTION_PEER_ACCESS says.
struct CacheRights {
  PeerAccess access = PeerAccess::kReadWrite;
  std::vector<uint64_t> clusters;  // of which clusters; empty: of whoever is linked
};

// LlmDataDist::RegisterKvCache with rights; a peer's transfer beyond them fails with LLM_PARAM_INVALID, at the peer.
LLM_DATADIST_API Status RegisterKvCache(const LlmDataDist &datadist, const CacheDesc &cache_desc,
                                        const std::vector<uint64_t> &addrs, const CacheRights &rights,
                                        int64_t &cache_id);

// Blocks of a registered cache, in each of its tensors.
struct WritableBlocks {
  int64_t cache_id = 0;
  std::vector<uint64_t> blocks;
};

// Lets that cluster write into those blocks until RevokeWrites, where PeerAccess says that peers write by grant. What
// counts is the memory: a push may name another cache that is registered over the same tensors, and a grant ends with
// none of them. All that one push writes must be in one grant, where what lies side by side is one piece. A peer is told
// digests of what it was granted (OPTION_VERIFY), and may so find out what stands there. At most 65536 grants are alive.
// LLM_KV_CACHE_NOT_EXIST for an unknown cache, LLM_PARAM_INVALID for a block that it does not have.
LLM_DATADIST_API Status GrantWrites(const LlmDataDist &datadist, uint64_t cluster_id,
                                    const std::vector<WritableBlocks> &blocks, uint64_t &grant_id);

// From this call on no write begins under the grant. LLM_SUCCESS: none is running any more either, or there is no such
// grant; its blocks are the caller's alone. LLM_LINK_BUSY: one is, ask again; it ends with its link. Never waits.
LLM_DATADIST_API Status RevokeWrites(const LlmDataDist &datadist, uint64_t grant_id);

// Returns when all memory that is registered by now has been gone through, or at Finalize. Nobody needs to wait for it.
LLM_DATADIST_API Status WaitForHugePages(const LlmDataDist &datadist, HugePagesReport &report);

}  // namespace llm_datadist

#endif  // LLM_DATADIST_LLM_DATADIST_EXT_H_
