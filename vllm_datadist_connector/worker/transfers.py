"""Transfers: the pulls of this rank that are under way, and what they ended in.

    WAITING ─> FENCED ─> PULLING ──all calls succeeded──> CONFIRMING ──held──> done
        │  ▲     │         │ │                              │
        │  └─────┼── fault ┘ │                              │
        └────────┴───────────┴── failure, cancel, deadline ─┴──> failed or cancelled

A pull of a hand-off makes calls as long as P tells of more (following.py), or offers P its blocks (offers.py), and is
confirmed once, at the end. It waits for its instance, and then for the device to have done what may still write into
its blocks. It ends, or begins anew, only when nothing writes there any more: no call of it is queued or running,
nobody may push into them, and where a call that failed may go on writing, the links over which it ran are gone. Nobody
reads what it wrote before all is confirmed.
"""

from __future__ import annotations

import enum
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from vllm_datadist_connector.labels import Failure, Transport
from vllm_datadist_connector.metadata import PullJob
from vllm_datadist_connector.protocol.handshake import RankGeometry
from vllm_datadist_connector.protocol.params import RemotePrefill
from vllm_datadist_connector.worker.device import PASSED, Fence
from vllm_datadist_connector.worker.following import Followed
from vllm_datadist_connector.worker.instances import Instance
from vllm_datadist_connector.worker.plan import NULL_BLOCK, BlockPull


class Phase(enum.Enum):
    WAITING = enum.auto()
    FENCED = enum.auto()
    PULLING = enum.auto()
    CONFIRMING = enum.auto()


@dataclass(slots=True)
class Transfer:
    job: PullJob
    remote: RemotePrefill
    """What P holds of it; of a hand-off that is not sealed, so far."""
    instance: Instance
    fence: Fence
    accepted_at: float
    deadline: float
    phase: Phase = Phase.WAITING
    unsubmitted: deque[tuple[RankGeometry, BlockPull]] = field(default_factory=deque)
    """Calls that the queue has had no room for yet, and whom each is from."""
    calls: dict[int, int] = field(default_factory=dict)
    """Native calls, or copies, that are queued or running, each with the cluster that it pulls from."""
    followed: list[Followed] = field(default_factory=list)
    """Of a hand-off: the ranks of P whose progress it follows."""
    grants: dict[int, Followed] = field(default_factory=dict)
    """By which ranks of P may write into the blocks, as our engine knows them."""
    writers: set[int] = field(default_factory=set)
    """Clusters over whose links a call that failed may still write into the blocks."""
    meeting: int = 0
    """The meeting of its instance whose links the calls use."""
    interrupted: bool = False
    """By a fault of a link: once its calls have come back, it waits for its instance again."""
    faults: int = 0
    """Of links, in calls of its own."""
    failure: Failure | None = None
    cancelled: bool = False
    told: bool = False
    """An operator has been told that its blocks are kept back."""
    num_bytes: int = 0
    early_bytes: int = 0
    """Of these, what was pulled before P's prefill was done."""
    pushed_bytes: int = 0
    """And what P has written."""
    transport: Transport = Transport.OTHER
    queued_s: float = 0.0
    run_s: float = 0.0
    """Of the slowest call, since they run beside or after one another; of a hand-off, of all of them, or of the slowest
    rank's pushes."""

    @property
    def is_over(self) -> bool:
        """Nothing more comes of it; at most its calls have still to come back."""
        return self.cancelled or self.failure is not None

    @property
    def is_written(self) -> bool:
        """Whether something may still write into the blocks."""
        return bool(self.calls or self.writers or self.grants)

    @property
    def is_followed(self) -> bool:
        """Whether more of it may become final, or be pushed."""
        return not all(each.is_settled for each in self.followed)

    def calls_to(self, cluster_id: int) -> int:
        """Of its calls, queued and running ones, those that pull from that cluster."""
        queued = sum(theirs.cluster_id == cluster_id for theirs, _ in self.unsubmitted)
        return queued + sum(each == cluster_id for each in self.calls.values())

    @property
    def num_blocks(self) -> int:
        return sum(block != NULL_BLOCK for group in self.job.local_blocks for block in group)


class TransferObserver(Protocol):
    """Takes measurements; called on the driver thread."""

    def pulled(self, transfer: Transfer, seconds: float) -> None: ...
    def failed(self, reason: Failure) -> None: ...
    def handshake(self, seconds: float) -> None: ...


class FinishedPulls(NamedTuple):
    """What the scheduler is told at the next step."""

    received: set[str]
    """Every pull that ended, well or not: the request leaves its wait."""
    failed: set[str]
    """Those whose blocks do not hold the KV cache; a subset of received."""
    invalid_blocks: set[int]
    """The local blocks of the failed ones."""


class Outbox:
    """Hands finished pulls from the driver thread to the step that asks next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._finished = FinishedPulls(set(), set(), set())
        self._has_some = threading.Event()

    def put(self, job: PullJob, failed: bool) -> None:
        with self._lock:
            self._has_some.set()
            self._finished.received.add(job.request_id)
            if failed:
                self._finished.failed.add(job.request_id)
                for group in job.local_blocks:
                    # The null block is in the tables of other requests, too: they would all be recomputed.
                    self._finished.invalid_blocks.update(block for block in group if block != NULL_BLOCK)

    def take(self, wait_s: float = 0.0) -> FinishedPulls:
        """
        Args:
            wait_s: at most so long, for the first one.
        """
        if wait_s:
            self._has_some.wait(wait_s)
        with self._lock:
            self._has_some.clear()
            finished, self._finished = self._finished, FinishedPulls(set(), set(), set())
            return finished


class TransferTable:
    """Transfers by request, by native call and by confirmation. Belongs to the driver thread."""

    def __init__(self) -> None:
        self._by_request: dict[str, Transfer] = {}
        self._by_call: dict[int, Transfer] = {}
        self._by_confirm: dict[int, Transfer] = {}

    def __len__(self) -> int:
        return len(self._by_request)

    def add(self, job: PullJob, instance: Instance, deadline: float, fence: Fence = PASSED) -> Transfer:
        transfer = Transfer(job, job.remote, instance, fence, accepted_at=time.monotonic(), deadline=deadline)
        self._by_request[job.request_id] = transfer
        return transfer

    def get(self, request_id: str) -> Transfer | None:
        return self._by_request.get(request_id)

    def add_call(self, transfer: Transfer, call_id: int, cluster_id: int = 0) -> None:
        transfer.calls[call_id] = cluster_id
        self._by_call[call_id] = transfer

    def take_call(self, call_id: int) -> tuple[Transfer, int] | None:
        """A call that has come back: its transfer, and the cluster that it pulled from."""
        transfer = self._by_call.pop(call_id, None)
        return (transfer, transfer.calls.pop(call_id)) if transfer is not None else None

    def add_confirm(self, transfer: Transfer, confirm_id: int) -> None:
        self._by_confirm[confirm_id] = transfer

    def take_confirm(self, confirm_id: int) -> Transfer | None:
        """The transfer that waits for this answer; None if it ended meanwhile."""
        transfer = self._by_confirm.pop(confirm_id, None)
        if transfer is None or self._by_request.get(transfer.job.request_id) is not transfer:
            return None
        return transfer

    def remove(self, transfer: Transfer) -> None:
        del self._by_request[transfer.job.request_id]

    def pulling_from(self, instance: Instance) -> list[Transfer]:
        return [t for t in self._by_request.values() if t.instance is instance and t.phase is Phase.PULLING]

    def fenced(self) -> list[Transfer]:
        return [t for t in self._by_request.values() if t.phase is Phase.FENCED and not t.is_over]

    def written_over(self, cluster_id: int) -> list[Transfer]:
        """Those into whose blocks a failed call over a link with that cluster may still write."""
        return [t for t in self._by_request.values() if cluster_id in t.writers]

    def quarantined(self) -> list[Transfer]:
        """Those that are over, with blocks that cannot be handed back yet."""
        return [t for t in self._by_request.values() if t.is_over and t.is_written]

    def unsubmitted(self) -> list[Transfer]:
        return [t for t in self._by_request.values() if t.unsubmitted]

    def instances(self) -> set[Instance]:
        """Those that some transfer needs."""
        return {transfer.instance for transfer in self._by_request.values()}

    def overdue(self, now: float) -> list[Transfer]:
        return [t for t in self._by_request.values() if not t.is_over and t.deadline <= now]

    def next_deadline(self) -> float | None:
        """May have passed already. One that is over waits for its running calls, not for time."""
        return min((t.deadline for t in self._by_request.values() if not t.is_over), default=None)
