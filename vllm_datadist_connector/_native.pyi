"""The C++ API as Python sees it: thin, no logic; codes are returned, not raised.

Every call that can block releases the GIL. Wrong argument *types* raise TypeError (pybind11); everything else is the
business of the engine and comes back as a status word (`LLM_SUCCESS` is 0) whose reason `last_error()` gives.
"""

from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple

LLM_SUCCESS: Final[int]
LLM_FAILED: Final[int]
LLM_WAIT_PROC_TIMEOUT: Final[int]
LLM_KV_CACHE_NOT_EXIST: Final[int]
LLM_PARAM_INVALID: Final[int]
LLM_NOT_YET_LINK: Final[int]
LLM_ALREADY_LINK: Final[int]
LLM_LINK_FAILED: Final[int]
LLM_UNLINK_FAILED: Final[int]
LLM_NOTIFY_PROMPT_UNLINK_FAILED: Final[int]
LLM_CLUSTER_NUM_EXCEED_LIMIT: Final[int]
LLM_PROCESSING_LINK: Final[int]
LLM_DEVICE_OUT_OF_MEMORY: Final[int]
LLM_EXIST_LINK: Final[int]
LLM_FEATURE_NOT_ENABLED: Final[int]
LLM_TIMEOUT: Final[int]
LLM_LINK_BUSY: Final[int]
LLM_OUT_OF_MEMORY: Final[int]

BlockIds = Sequence[int] | Any
"""Block indices: a list or tuple of int, or any contiguous one-dimensional buffer of int64 or uint64 (array.array('q'),
numpy). Negative values are refused with LLM_PARAM_INVALID."""

def last_error() -> str:
    """Why the last call on this thread failed; empty after a success."""

def status_name(status: int) -> str:
    """`"LLM_TIMEOUT"` for 0x5010B01A and so on."""

def providers() -> list[str]:
    """Providers that can be constructed in this process, preferred first: `"engine"`, and `"cann"` where it loads."""

class ClusterInfo:
    """One peer of a link or unlink call. IPs are literals; `remote` has exactly one entry for a link."""

    remote_cluster_id: int
    remote_role_type: int
    local_ip_infos: list[tuple[str, int]]
    remote_ip_infos: list[tuple[str, int]]
    def __init__(
        self,
        remote_cluster_id: int = 0,
        remote_ip_infos: list[tuple[str, int]] = ...,
        local_ip_infos: list[tuple[str, int]] = ...,
        remote_role_type: int = 0,
    ) -> None: ...

class LinkReport(NamedTuple):
    alive: bool
    transport: str
    transport_reason: str
    peer: str
    bytes_pulled: int
    bytes_pushed: int
    blocks_verified: int
    blocks_wrong: int

class HugePagesReport(NamedTuple):
    allowed: bool
    """False: nothing was asked for, as option datadist.HugePages is off or the machine says "never"."""
    bytes: int
    """The whole huge pages of what was registered."""
    huge_bytes: int
    """Of these, known to be huge now; what nobody has touched yet is not counted."""
    seconds: float
    """That it took in the background."""

def advise_huge_pages(address: int, length: int) -> bool:
    """Asks for huge pages under the first touch of memory. False, and nothing changed, where the machine has none to
    give."""

class Capabilities(NamedTuple):
    """What a provider can do and what it demands; a limit of 0 is none."""

    engine_options: bool
    """It takes the options named `datadist.`"""
    reports_port: bool
    """listen_port() tells a port that the system chose."""
    reports_links: bool
    """query_link() tells; otherwise no link can be known to be dead."""
    ipv6: bool
    host_memory: bool
    device_memory: bool
    register_before_link: bool
    """Memory registered after a link was made is unknown over that link."""
    writes_end_with_call: bool
    """Whatever a call writes here is written when it returns, however it ends. Otherwise a call that failed may go on
    writing until its link has been unlinked by force."""
    grants_writes: bool
    """grant_writes() and revoke_writes(); otherwise peers write wherever they like."""
    peer_drops_half: bool
    """When one side unlinks or dies, the other's half of the link goes, too."""
    crossing_links: bool
    """Two that link with each other at once both get an answer."""
    both_listen: bool
    """A side that only pulls must listen as well."""
    max_addrs_per_cache: int
    max_regions: int
    """Distinct (address, size) pairs over all registrations."""
    max_links: int
    min_run_bytes: int
    """Shorter contiguous runs are possible, and too slow to be of use."""
    min_link_timeout_ms: int

class LlmDataDist:
    """`llm_datadist::LlmDataDist` of the chosen provider. Role: 1 prompt, 2 decoder, 3 mix.

    Use after fork() in the child is refused with LLM_FAILED.
    """

    def __init__(self, cluster_id: int, role: int, provider: str = "engine") -> None: ...
    @property
    def cluster_id(self) -> int: ...
    @property
    def provider(self) -> str: ...
    @property
    def capabilities(self) -> Capabilities: ...
    def enter_thread(self) -> int:
        """Once on each thread that will call, before it does; the threads of a TransferQueue have done it."""

    def initialize(self, options: dict[str, str]) -> int: ...
    def finalize(self) -> None: ...
    def set_role(self, role: int, options: dict[str, str] = ...) -> int: ...
    def link_clusters(self, clusters: list[ClusterInfo], timeout_ms: int = 1000) -> tuple[int, list[int]]:
        """(overall status, status per cluster)."""

    def unlink_clusters(
        self, clusters: list[ClusterInfo], timeout_ms: int = 1000, force: bool = False
    ) -> tuple[int, list[int]]: ...
    def register_kv_cache(
        self, shape: Sequence[int], data_type: int, addrs: Sequence[int], placement: int = 1
    ) -> tuple[int, int]:
        """(status, cache id). One address per tensor; `data_type` is the ge number (uint8 is 4); placement 0 host,
        1 device."""

    def unregister_kv_cache(self, cache_id: int) -> int: ...
    def pull_kv_blocks(
        self,
        src_cluster_id: int,
        src_cache_id: int,
        dst_cache_id: int,
        src_blocks: BlockIds,
        dst_blocks: BlockIds,
        src_layer_range: tuple[int, int] = (-1, -1),
        dst_layer_range: tuple[int, int] = (-1, -1),
        tensor_num_per_layer: int = 2,
    ) -> int: ...
    def push_kv_blocks(
        self,
        src_cache_id: int,
        dst_cluster_id: int,
        dst_cache_id: int,
        src_blocks: BlockIds,
        dst_blocks: BlockIds,
        num_tensors: int,
        src_layer_range: tuple[int, int] = (-1, -1),
        dst_layer_range: tuple[int, int] = (-1, -1),
        tensor_num_per_layer: int = 2,
    ) -> int:
        """`num_tensors` is the source cache's: PushKvBlocks takes the layer count from it when no range is given."""

    def pull_kv_cache(
        self,
        src_cluster_id: int,
        src_cache_id: int,
        src_batch_index: int,
        dst_cache_id: int,
        dst_batch_index: int = 0,
        size: int = -1,
        src_layer_range: tuple[int, int] = (-1, -1),
        dst_layer_range: tuple[int, int] = (-1, -1),
        tensor_num_per_layer: int = 2,
    ) -> int: ...
    def push_kv_cache(
        self,
        src_cache_id: int,
        src_batch_index: int,
        dst_cluster_id: int,
        dst_cache_id: int,
        dst_batch_index: int,
        num_tensors: int,
        size: int = -1,
        src_layer_range: tuple[int, int] = (-1, -1),
        dst_layer_range: tuple[int, int] = (-1, -1),
        tensor_num_per_layer: int = 2,
    ) -> int: ...
    def grant_writes(self, cluster_id: int, blocks: Sequence[tuple[int, BlockIds]]) -> tuple[int, int]:
        """(status, id of the grant). That cluster may write into those blocks of those caches (cache id, blocks), under
        whatever cache id their memory is registered, until revoke_writes(). `datadist.PeerAccess` must say that peers
        write by grant."""

    def revoke_writes(self, grant_id: int) -> int:
        """From this call on no write begins under the grant. LLM_SUCCESS: none is running any more; LLM_LINK_BUSY: one
        is, ask again. Never waits."""

    def listen_port(self) -> tuple[int, int]:
        """(status, port the listener is bound to)."""

    def query_link(self, cluster_id: int) -> tuple[int, LinkReport | None]: ...
    def linked_clusters(self) -> tuple[int, list[int]]:
        """(status, all with which there is a link, whoever made it)."""

    def wait_for_huge_pages(self) -> tuple[int, HugePagesReport | None]:
        """Returns when all memory that is registered by now has been gone through, or at finalize()."""

# ---- what only the Python API of LLM-DataDist has, beside LlmDataDist ----

CACHE_CONTIGUOUS: Final[int]
"""Layout of a cache addressed by batch row: `shape[0]` rows, no blocks."""
CACHE_BLOCKS: Final[int]
"""Layout of a cache addressed by block: `shape[0]` blocks, one batch row."""

KEY_REQUEST: Final[int]
KEY_PREFIX: Final[int]
KEY_BLOCKS: Final[int]

Key = tuple[int, int, int]
"""(kind, id, model id) of a cache key: a request's id or a prefix id names one row of a contiguous cache; kind
KEY_BLOCKS, id 0, names a whole blocks cache."""

CacheRef = int | Key
"""How a cache of a peer is named: by its cache id or by one of its keys. A key says its row itself."""

LayerSpan = tuple[int, int]
"""Layers [start, stop)."""

COMM_OK: Final[int]
COMM_PREPARING: Final[int]
COMM_FAILED: Final[int]

def tensor_bytes(shape: Sequence[int], data_type: int) -> tuple[int, int]:
    """(status, bytes of one tensor); data types as in register_kv_cache. LLM_PARAM_INVALID for a data type without a
    size, a dimension that is not positive, more than 31 dimensions, or more than 64 bits."""

class ManagedDataDist:
    """LlmDataDist with cache layouts, cache keys, allocation from pools, two-sided mode and bilateral links.

    Always our own engine. Codes are returned, not raised; reasons are in last_error(). Options as LlmDataDist's, and
    `llm.EnableRemoteCacheAccessible` ("0", the default: two-sided, keys are consumed; "1": as LlmDataDist),
    `llm.MemPoolConfig` and `llm.HostMemPoolConfig` (JSON: memory_size, page_shift).
    """

    def __init__(self, cluster_id: int, role: int) -> None: ...
    @property
    def cluster_id(self) -> int: ...
    def initialize(self, options: dict[str, str]) -> int: ...
    def finalize(self) -> None: ...
    def set_role(self, role: int, options: dict[str, str] = ...) -> int: ...
    def link_clusters(self, clusters: list[ClusterInfo], timeout_ms: int = 1000) -> tuple[int, list[int]]: ...
    def unlink_clusters(
        self, clusters: list[ClusterInfo], timeout_ms: int = 1000, force: bool = False
    ) -> tuple[int, list[int]]: ...
    def link_comm(
        self, name: str, members: Sequence[tuple[int, int, str, int]], total_time_s: int = 120
    ) -> tuple[int, int]:
        """(status, comm id from 1). Members, ourselves included: (cluster id, rank, ip, port), ranks ascending. Every
        ip empty: each other member is a loopback peer, whose caches are our own. Returns at once; for total_time_s the
        members try to reach each other, see query_comm.
        LLM_PARAM_INVALID: our cluster id is not a member, an address is missing or malformed, too many comms.
        LLM_FEATURE_NOT_ENABLED with backend hixl."""

    def unlink_comm(self, comm_id: int) -> int:
        """Ends the preparation, waits for running transfers, drops the links. LLM_NOT_YET_LINK: unknown id."""

    def query_comm(self, comm_id: int) -> tuple[int, int, str]:
        """(status, COMM_OK | COMM_PREPARING | COMM_FAILED, why it failed). LLM_NOT_YET_LINK: unknown id."""

    def has_links(self) -> bool: ...
    def listen_port(self) -> tuple[int, int]: ...
    def query_link(self, cluster_id: int) -> tuple[int, LinkReport | None]: ...
    def register_cache(
        self,
        layout: int,
        num_tensors: int,
        shape: Sequence[int],
        data_type: int,
        placement: int,
        addrs: Sequence[int],
        keys: Sequence[Key | None] = ...,
        remote_accessible: bool = True,
    ) -> tuple[int, int]:
        """(status, cache id). keys[i] names row i (None: no key for that row); a blocks cache has at most one. A key
        that is bound already: the first request or prefix key wins, the last blocks key wins."""

    def unregister_cache(self, cache_id: int) -> int:
        """Unknown id: LLM_SUCCESS. Keys of the cache go with it."""

    def allocate_cache(
        self,
        layout: int,
        num_tensors: int,
        shape: Sequence[int],
        data_type: int,
        placement: int,
        keys: Sequence[Key | None] = ...,
    ) -> tuple[int, int, list[int]]:
        """(status, cache id, one address per tensor) from the placement's pool. LLM_FEATURE_NOT_ENABLED: no pool at
        all. LLM_PARAM_INVALID: no pool of that placement, more keys than rows, a key given twice or bound already.
        LLM_OUT_OF_MEMORY: the pool is exhausted."""

    def deallocate_cache(self, cache_id: int) -> int:
        """Drops the id's reference (and a blocks cache's key). Unknown id, registered cache: LLM_SUCCESS, nothing
        happens. LLM_FEATURE_NOT_ENABLED: no pool."""

    def remove_cache_key(self, key: Key) -> int:
        """Drops the key's reference. Unknown key, key of a registered cache: LLM_SUCCESS, nothing happens.
        LLM_FEATURE_NOT_ENABLED: no pool."""

    def pull_rows(
        self,
        src_cluster_id: int,
        src: CacheRef,
        dst_cache_id: int,
        src_batch_index: int = 0,
        dst_batch_index: int = 0,
        size: int = -1,
        src_layers: LayerSpan | None = None,
        dst_layers: LayerSpan | None = None,
        tensor_num_per_layer: int = 2,
        src_offset: int = 0,
        dst_offset: int = 0,
    ) -> int:
        """`size` bytes (-1: a whole local row less dst_offset) of one row of each selected tensor. In two-sided mode a
        request key is consumed once every tensor of its cache has been pulled by it. Checks as PullKvCache."""

    def pull_blocks(
        self,
        src_cluster_id: int,
        src: CacheRef,
        dst_cache_id: int,
        src_blocks: BlockIds,
        dst_blocks: BlockIds,
        src_batch_index: int = 0,
        src_layers: LayerSpan | None = None,
        dst_layers: LayerSpan | None = None,
        tensor_num_per_layer: int = 2,
    ) -> int:
        """Blocks to blocks; with src_blocks empty a row to blocks: dst_blocks[k] receives the k-th piece, one local
        block long, of the source row; the last piece may be shorter."""

    def push_layer(
        self,
        src_cache_id: int,
        src_layer: int,
        dst_cluster_id: int,
        dst: CacheRef,
        dst_layer: int,
        src_batch_index: int = 0,
        dst_batch_index: int = 0,
        src_blocks: BlockIds = ...,
        dst_blocks: BlockIds = ...,
        dst_block_bytes: int = 0,
        tensor_num_per_layer: int = 2,
    ) -> int:
        """One layer. No blocks: row to row. Both lists: block to block. dst_blocks only: row to blocks, piece k being
        the k-th dst_block_bytes of the row (the last one shorter where the row ends) and block b of the destination
        lying at b * dst_block_bytes. LLM_FEATURE_NOT_ENABLED unless remote accessible."""

    def push_layer_to_addrs(
        self,
        src_cache_id: int,
        src_layer: int,
        dst_cluster_id: int,
        dst_addrs: Sequence[int],
        src_batch_index: int = 0,
        src_blocks: BlockIds = ...,
        dst_blocks: BlockIds = ...,
        dst_block_bytes: int = 0,
    ) -> int:
        """As push_layer, to one address of the peer per tensor of the layer. The peer writes only where one of its
        caches is: LLM_PARAM_INVALID otherwise."""

    def copy_row(
        self,
        dst_cache_id: int,
        src_cache_id: int,
        dst_batch_index: int = 0,
        src_batch_index: int = 0,
        offset: int = 0,
        size: int = -1,
    ) -> int:
        """Within this process: `size` bytes (-1: the rest of the source row) at `offset` of both rows."""

    def copy_blocks(self, cache_id: int, src_blocks: BlockIds, dst_blocks: BlockIds) -> int:
        """Within one blocks cache, in list order."""

    def swap_blocks(
        self,
        src_cache_id: int,
        src_addrs: Sequence[int],
        dst_cache_id: int,
        dst_addrs: Sequence[int],
        block_bytes: int,
        src_blocks: BlockIds,
        dst_blocks: BlockIds,
    ) -> int:
        """Copies src_blocks[i] to dst_blocks[i] of each tensor, in this process. A side with a cache id above 0 is
        that cache and its addresses are ignored; any other is memory of the caller's, who answers for its size."""

class QueueFullError(RuntimeError):
    """`capacity` operations are waiting or running."""

class Completion(NamedTuple):
    """Terminal state of one submitted operation; each submitted id appears in exactly one."""

    id: int
    status: int
    """What the call returned; LLM_TIMEOUT if the deadline passed before it started."""
    cancelled: bool
    """True if cancel() or drain() removed it before it started; it then never ran and status is LLM_FAILED."""
    error: str
    """The call's last-error text; empty on success."""
    queued_s: float
    run_s: float

class TransferQueue:
    """A bounded pool of native threads that runs Pull/Push/Link/Unlink calls without the GIL.

    submit -> id at once; poll() -> completions; fileno() is an eventfd, readable while completions wait. Operations to
    one cluster run one at a time and in order of submission; those to different clusters run in parallel. A running
    operation cannot be interrupted (the engine bounds it by its own timeout): cancel() of one only says False.
    """

    def __init__(self, datadist: LlmDataDist, threads: int = 4, capacity: int = 4096) -> None: ...
    def submit_pull_blocks(
        self,
        src_cluster_id: int,
        src_cache_id: int,
        dst_cache_id: int,
        src_blocks: BlockIds,
        dst_blocks: BlockIds,
        deadline_ms: int,
        src_layer_range: tuple[int, int] = (-1, -1),
        dst_layer_range: tuple[int, int] = (-1, -1),
        tensor_num_per_layer: int = 2,
    ) -> int: ...
    def submit_push_blocks(
        self,
        src_cache_id: int,
        dst_cluster_id: int,
        dst_cache_id: int,
        src_blocks: BlockIds,
        dst_blocks: BlockIds,
        num_tensors: int,
        deadline_ms: int,
        src_layer_range: tuple[int, int] = (-1, -1),
        dst_layer_range: tuple[int, int] = (-1, -1),
        tensor_num_per_layer: int = 2,
    ) -> int: ...
    def submit_link(self, cluster: ClusterInfo, timeout_ms: int, deadline_ms: int) -> int: ...
    def submit_unlink(self, cluster: ClusterInfo, timeout_ms: int, deadline_ms: int, force: bool = False) -> int: ...
    def poll(self) -> list[Completion]:
        """Completions since the last poll, oldest first; never blocks. Resets fileno()."""

    def cancel(self, id: int) -> bool:
        """True if the operation had not started: it will complete as cancelled. False: it runs, ended, or never was."""

    def drain(self, timeout_s: float) -> bool:
        """Cancels what has not started, waits for what runs; True if nothing is left. Submitting is refused from then
        on with RuntimeError."""

    def fileno(self) -> int: ...
    def close(self) -> None:
        """drain, then joins the threads: waits for running operations, which their own timeouts bound. Idempotent."""

class EndedLease(NamedTuple):
    request_id: str
    why: str
    """released, expired, unclaimed (expired, and nobody ever renewed it) or revoked"""
    asked_by: str
    """Who renewed it last, as far as that is known: "process PID" or "host:port"; empty if nobody did."""

class Refusal(NamedTuple):
    """A confirmation that was refused."""

    request_id: str
    """Empty: of no lease that stands or has ended not long ago."""
    asked_by: str
    reason: str

class ManualClock:
    """Stands still until somebody sets `now` (seconds): for tests, which cannot wait for leases to run out."""

    now: float
    def __init__(self) -> None: ...

class LeaseTable:
    """P's promises to keep finished requests' blocks, the only place that knows which still stand.

    grant ──> held ──┬── release (D is done, or will never come)
                     ├── expiry (no renewal for claim_s, then lease_s, or limit_s after the grant)
                     └── revoke (P needs the blocks itself)

    A lease leaves the table before take_ended() tells of it, so a confirmation that succeeds proves that the blocks
    were the request's own until then. Tokens and digests are 32 hex digits.
    """

    def __init__(self, limit_s: float, clock: ManualClock | None = None) -> None: ...
    def grant(
        self,
        request_id: str,
        prompt_digest: str,
        blocks_digest: str,
        num_blocks: int,
        claim_s: float,
        lease_s: float,
        token: str = "",
    ) -> tuple[str, int]:
        """Keeps a request's blocks for `claim_s`, and for `lease_s` from each renewal: (token, generation).

        Args:
            token: the one of its hand-off, if it had one. ValueError if a lease of that token is held.
        """

    def confirm(self, token: str, generation: int, prompt_digest: str, blocks_digest: str, by: str = "") -> str:
        """Empty if the lease stands, for this prompt and these blocks; otherwise why the read does not count."""

    def renew(self, tokens: Sequence[str], pulling: bool = False, by: str = "") -> tuple[str, ...]:
        """Extends leases by their duration from now, within their limit; returns the tokens that name none.

        Args:
            pulling: their D reads the blocks right now.
            by: who asks, for those who look for him.
        """

    def release(self, tokens: Sequence[str]) -> None: ...
    def revoke(self, which: Literal["unclaimed", "idle", "all"], age_s: float, most: int) -> int:
        """Ends at most `most` such leases that were granted at least `age_s` ago, the oldest first; returns how many.

        A D that reads one all the same is refused its confirmation. Unclaimed: no D has renewed it yet; idle: no D says
        that it is pulling it right now.
        """

    def revoke_idle(self, token: str) -> bool:
        """Ends that lease unless it is being pulled; whether it did."""

    def changes(self) -> int:
        """Another number after whatever makes the members below say something new; oldest_s() counts whole seconds."""

    def take_ended(self) -> list[EndedLease]:
        """Leases that ended since the last call, each once."""

    def take_refused(self) -> tuple[int, list[Refusal]]:
        """Confirmations that were refused since the last call: how many, and the first of them."""

    def take_served(self) -> tuple[int, int]:
        """(leases, their blocks) that were confirmed since the last call, each lease once however often."""

    def held(self) -> tuple[int, int]:
        """(leases, blocks) that are held now."""

    def oldest_s(self) -> float:
        """Seconds since the first grant that is still held; 0 without one."""

class HandoffTable:
    """P's requests whose KV a D reads while P still prefills them, each by the token that its lease will have.

    promise ──> promised ── begin ──> begun ──┬── seal ──> sealed ── forget ──> (remembered as ended)
                              └─ again ─┘     └── end ───> (remembered as ended)

    The scheduler says what becomes of each; how far the workers are comes from their ProgressReporters, and D asks for
    both by ChannelClient.await_handoff(). A lease is granted under the token before seal(), so that a D that renews it
    always finds one or the other.
    """

    key: str
    """32 hex digits, for the workers of this very instance: only who has it can report."""
    def __init__(self, max_handoffs: int = 65536) -> None: ...
    def promise(self, token: str, request_id: str) -> bool:
        """False if the token is known, also as one that has ended, or there are too many."""

    def begin(self, token: str, epoch: int, blob: bytes) -> None:
        """The blocks so far, from the first chunk on and whenever there are more, or, of a larger epoch, others.

        Changes nothing of a token that is neither promised nor begun. ValueError for a blob that no message has room
        for: one of nearly 1 MiB fits.
        """

    def seal(self, token: str, epoch: int, blob: bytes) -> bool:
        """Its lease has been granted. False: no D waits for it any more, or it has ended: the lease is of no use."""

    def end(self, token: str, reason: str) -> None: ...
    def forget(self, tokens: Sequence[str]) -> None:
        """Those whose leases have ended; changes nothing of tokens that are not sealed."""

    def is_withdrawn(self, token: str) -> bool:
        """D has released it before it was sealed."""

    def is_awaited(self, token: str) -> bool:
        """A D has asked for it, or renewed it."""

    def __len__(self) -> int:
        """Those that are promised, begun or sealed."""

class RoleSwitch:
    """What an instance does for others, where that changes while it serves. At first it does both."""

    gives: bool
    """Whether a lease may be granted or a hand-off promised now. So `takes`: of requests that come now."""
    takes: bool
    may_pull: bool
    """Whether a request that was taken may still begin its pull."""
    role: str
    """prefill, decode or both"""
    def __init__(self, leases: LeaseTable, handoffs: HandoffTable, apply_s: float = 30.0) -> None:
        """`apply_s`: what a rank is given to leave its links."""

    def set_taken(self, count: int) -> None:
        """Requests that were taken, and are not done."""

class ProgressReporter:
    """A worker of P tells its instance how far it is with requests that are handed off, from a native thread.

    begin_step ── layer, layer, … ── end_step: what each says must be true of the device's memory, because a D reads it.
    No method but close() waits for anything.
    """

    def __init__(
        self, content_version: int, pp_rank: int, tp_rank: int, auth: str = "", insecure: bool = False
    ) -> None: ...
    def begin_step(self, endpoint: tuple[str, int], key: str, entries: Sequence[tuple[str, int, int, int]]) -> None:
        """A step computes the tokens [before, after) of each entry: (token, epoch, before, after).

        A step before it that was not ended is not taken as done. ValueError for one that goes backwards.

        Args:
            endpoint: of the instance's ChannelServer.
            key: of its HandoffTable.
        """

    def layer(self, index: int) -> None:
        """Of every entry of the step that layer has been written."""

    def end_step(self) -> None:
        """All layers have."""

    def __len__(self) -> int:
        """Entries of the step, and those that have not been told."""

    def close(self) -> None:
        """What was not told stays so. Idempotent."""

MAX_LEASES_PER_MESSAGE: Final[int]

class RankDescription(NamedTuple):
    geometry: bytes
    """As P gave it to set_geometries()."""

class Renewed(NamedTuple):
    gone: tuple[str, ...]
    """Tokens that name no lease (any more)."""

class Confirmed(NamedTuple):
    held: bool
    reason: str

class Released(NamedTuple): ...

class HandoffNews(NamedTuple):
    state: str
    """unknown, promised, begun, sealed or ended"""
    epoch: int
    """Of the blocks: another after a preemption, and marks of an earlier one are void."""
    version: int
    """Of state, epoch and blob."""
    stamp: int
    """Of all that whoever asks can see."""
    blob: bytes | None
    """As P gave it; None: as seen."""
    mark_epoch: int
    """This and all below but the reason: of the rank that was asked for; zeros if there is nothing of it."""
    base: int
    """Tokens [0, base) are final in all layers."""
    next: int
    """And [0, next) in those that `layers` has."""
    layers: bytes
    """Layer i: bit i % 8 of byte i // 8."""
    reason: str
    """Why it ended."""
    delivery: str
    """This and all below: of what the rank that was asked for has written by `offer_id`. none, offered, running, done
    or failed."""
    delivery_epoch: int
    num_bytes: int
    early_bytes: int
    """Of these, before the hand-off was sealed."""
    run_s: float
    """That the writing took."""
    delivery_reason: str
    """Why it failed."""

class Reported(NamedTuple): ...
class Offered(NamedTuple): ...

class Watched(NamedTuple):
    """What a rank was offered, or that it is to change its role."""

    number: int
    """Counts from 1; 0: nothing is new, and the rest is empty."""
    token: str
    offer_id: int
    blob: bytes
    """As D gave it."""
    role: str
    """prefill, decode or both: no offer; empty: one, or nothing. This and all below: of a change of role."""
    attempt: int
    """For declare()."""
    limit_s: float
    """Within which the rank declares what has become of it."""

class Switched(NamedTuple):
    """How far a change of an instance's role is."""

    state: str
    """refused, draining, applying or done"""
    role: str
    """Which it has, or had before."""
    leases: int
    """This and all below but the reason: what it waits for."""
    handoffs: int
    taken: int
    """Requests whose KV is pulled there, or will be."""
    ranks: int
    reason: str
    """Why it was refused."""

class Refused(NamedTuple):
    """P has no such rank, or is another one; there is no such hand-off."""

    reason: str

class ChannelAnswer(NamedTuple):
    """`response` or, if it is None, why there is none."""

    id: int
    response: (
        RankDescription
        | Renewed
        | Confirmed
        | Released
        | HandoffNews
        | Reported
        | Offered
        | Watched
        | Switched
        | Refused
        | None
    )
    error: str
    timed_out: bool
    """The server said nothing, but somebody listens there, or nothing is known of it: to ask again may help."""

class ChannelServer:
    """P's end of the side channel: answers from its LeaseTable and geometries on a native thread, without the GIL."""

    port: int
    def __init__(
        self,
        host: str,
        port: int,
        engine_id: str,
        incarnation: str,
        content_version: int,
        leases: LeaseTable,
        auth: str = "",
        insecure: bool = False,
        grace_s: float = 30.0,
        handoffs: HandoffTable | None = None,
        roles: RoleSwitch | None = None,
    ) -> None:
        """Listens at once; port 0 lets the system choose. `auth` is the path of a key file. An asker without a
        connection has left after `grace_s`. Without `handoffs` it knows of none, without `roles` it keeps its role.

        Raises:
            OSError: the address cannot be bound.
            ValueError: it is none, or other hosts can reach it and neither `auth` nor `insecure` says who may.
        """

    def set_geometries(self, geometries: dict[tuple[int, int], bytes]) -> None:
        """By (pp rank, tp rank). ValueError for one that is too large for a message."""

    def take_left_askers(self) -> list[int]:
        """Clusters that have asked for a rank to link with it, and have left."""

    def close(self) -> None:
        """Ends all connections and gives the address back. Idempotent."""

class ChannelClient:
    """D's end of the side channel: requests to many servers, sent by a native thread.

    Each method sends one request and returns its id at once. Every id comes back from take() exactly once, as an answer
    or as the reason why there is none, at the latest after `timeout_s`; fileno() is readable while some wait.
    """

    def __init__(
        self,
        content_version: int,
        auth: str = "",
        insecure: bool = False,
        max_servers: int = 256,
        idle_s: float = 300.0,
    ) -> None: ...
    def describe_rank(
        self,
        endpoint: tuple[str, int],
        engine_id: str,
        incarnation: str,
        pp_rank: int,
        tp_rank: int,
        timeout_s: float,
        asker: int = 0,
    ) -> int:
        """Answered by RankDescription or Refused. `asker`: our cluster id, if we are going to link with that rank."""

    def renew(self, endpoint: tuple[str, int], tokens: Sequence[str], timeout_s: float, pulling: bool = False) -> int:
        """Answered by Renewed. At most MAX_LEASES_PER_MESSAGE tokens."""

    def release(self, endpoint: tuple[str, int], tokens: Sequence[str], timeout_s: float) -> int:
        """Answered by Released. At most MAX_LEASES_PER_MESSAGE tokens."""

    def confirm(
        self,
        endpoint: tuple[str, int],
        token: str,
        generation: int,
        prompt_digest: str,
        blocks_digest: str,
        timeout_s: float,
    ) -> int:
        """Answered by Confirmed."""

    def await_handoff(
        self,
        endpoint: tuple[str, int],
        token: str,
        rank: tuple[int, int] | None,
        seen_version: int,
        seen_stamp: int,
        patience_s: float,
        timeout_s: float,
        offer_id: int = 0,
    ) -> int:
        """Answered by HandoffNews: once there is any after what was seen, or as it stands when patience is over.

        Args:
            rank: (pp, tp) of the one whose progress is news, too.
            patience_s: at most 30; `timeout_s` begins when it is over.
            offer_id: not the rank's progress is news, but what it writes by that offer.
        """

    def offer(
        self, endpoint: tuple[str, int], token: str, rank: tuple[int, int], offer_id: int, blob: bytes, timeout_s: float
    ) -> int:
        """That rank may write what it has of a hand-off into blocks of ours. Answered by Offered or Refused.

        Args:
            offer_id: not 0; another for each, so that requests which take one hand-off are told apart.
            blob: which blocks, for that rank to read. ValueError for one that no message has room for.
        """

    def watch(
        self,
        endpoint: tuple[str, int],
        key: str,
        rank: tuple[int, int],
        seen: int,
        patience_s: float,
        timeout_s: float,
    ) -> int:
        """For P's own ranks. Answered by Watched: the first order after `seen`, or none when patience is over."""

    def deliver(
        self,
        endpoint: tuple[str, int],
        key: str,
        rank: tuple[int, int],
        token: str,
        offer_id: int,
        state: str,
        epoch: int,
        num_bytes: int,
        early_bytes: int,
        run_s: float,
        reason: str,
        timeout_s: float,
    ) -> int:
        """For P's own ranks: what has become of an offer, as HandoffNews tells it. Answered by Reported."""

    def declare(
        self, endpoint: tuple[str, int], key: str, rank: tuple[int, int], attempt: int, reason: str, timeout_s: float
    ) -> int:
        """For an instance's own ranks: what has become of a change of role. Answered by Reported.

        Args:
            reason: why it has not been done; empty: it has.
        """

    def switch_role(
        self, endpoint: tuple[str, int], wish_id: str, role: str, drain_s: float, patience_s: float, timeout_s: float
    ) -> int:
        """Answered by Switched: once the instance has that role or will not have it, or when patience is over.

        Args:
            wish_id: 32 hex digits, the same as long as it is asked for the same.
            role: prefill, decode or both.
        """

    def take(self) -> list[ChannelAnswer]:
        """What has come back, oldest first; never blocks. Resets fileno()."""

    def fileno(self) -> int: ...
    def close(self) -> None:
        """Drops what is outstanding, and waits for nobody. Idempotent."""

class LeaseKeeper:
    """D's side of leases: renews them from the arrival of a request until its KV cache is here, then releases.

    On a native thread, without the GIL: P hears of a lease a moment later, several times while it lasts, and when a
    pull begins. Several requests may share a lease. No method but close() waits for anything, or wakes a thread.
    """

    def __init__(
        self,
        content_version: int,
        answer_timeout_s: float,
        auth: str = "",
        insecure: bool = False,
        max_leases: int = 65536,
        news_s: float = 0.25,
        release_retry_s: float = 1.0,
        release_after_s: float = 0.05,
    ) -> None:
        """
        Args:
            news_s: what P has said of a lease is true for so long, or nearly: it may need the blocks itself.
            release_after_s: from the last user's release to P's being told; who comes meanwhile shares the lease.
        """

    def hold(self, endpoint: tuple[str, int], token: str, lease_s: float, is_news: bool = True) -> bool:
        """Starts renewing a lease, or adds a user to it. False if there are too many.

        Args:
            is_news: P has granted it just now. Otherwise, or where it was released or gone before, holds() tells only
                what P says.
        """

    def holds(self, token: str) -> bool | None:
        """False: the lease is gone, and its blocks are not worth a pull. None: P is being asked, and has time left."""

    def pulls(self, token: str, at_most_s: float) -> None:
        """A user of the lease has begun to pull: P is told so, for as long as that can take."""

    def lose(self, token: str) -> None:
        """P, which we are ourselves, has ended the lease."""

    def release(self, token: str) -> None:
        """Takes one user off a lease; with the last one, P is told that its blocks are free."""

    def __len__(self) -> int:
        """Leases that are kept, and those whose release P has not heard."""

    def close(self) -> None:
        """Leases that are still held run out by themselves. Idempotent."""

class PromptHash:
    """The digest of a prompt that is read in pieces: BLAKE2b of 16 bytes.

    Over each id as uint32, little-endian; one that this does not hold, or 0xffffffff, is that and the id as int64.
    """

    def __init__(self) -> None: ...
    def update(self, token_ids: Sequence[int]) -> None: ...
    def copy(self) -> PromptHash: ...
    def hexdigest(self, adapter: str = "", mm_hashes: Sequence[str] = ()) -> str:
        """32 hex digits of token ids, LoRA adapter and multi-modal content hashes (in prompt order)."""

class PendingHash:
    done: bool
    def take(self) -> PromptHash | None:
        """None until it is done."""

class PromptHasher:
    """Reads prompts on a native thread, without the GIL, one after another."""

    def __init__(self) -> None: ...
    def begin(self, token_ids: Sequence[int], num_tokens: int) -> PendingHash:
        """Of the first `num_tokens`, which it copies. One that is dropped before its turn costs nothing."""

    def close(self) -> None:
        """Drops what waits. Idempotent."""

def blocks_digest(blocks: Sequence[Sequence[int]]) -> str:
    """32 hex digits of all blocks, by group, in their order."""

def digest_and_count(blocks: Sequence[Sequence[int]]) -> tuple[str, int]:
    """blocks_digest(), and how many of them are blocks: 0 stands for what a sliding window has left."""
