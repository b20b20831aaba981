"""Transfers: the pulls of this rank that are under way, and what they ended in.

    WAITING (for its instance) ──> PULLING ──all calls succeeded──> CONFIRMING ──held──> done
        │         ▲                   │ │                              │
        │         └─── link fault ────┘ │                              │
        └───────────────────────────────┴── failure, cancel, deadline ─┴──> failed or cancelled

A transfer ends, or begins anew, only when no call of it is queued or running: from then on nothing writes into its
blocks. What a call that failed has written there is written again; nobody reads it before all is confirmed.
"""

from __future__ import annotations

import enum
import threading
import time
from dataclasses import dataclass, field
from typing import NamedTuple

from vllm_datadist_connector.labels import Failure, Transport
from vllm_datadist_connector.metadata import PullJob
from vllm_datadist_connector.worker.instances import Instance
from vllm_datadist_connector.worker.plan import NULL_BLOCK


class Phase(enum.Enum):
    WAITING = enum.auto()
    PULLING = enum.auto()
    CONFIRMING = enum.auto()


@dataclass(slots=True)
class Transfer:
    job: PullJob
    instance: Instance
    accepted_at: float
    deadline: float
    phase: Phase = Phase.WAITING
    calls: set[int] = field(default_factory=set)
    """Native calls, or copies, that are queued or running."""
    meeting: int = 0
    """The meeting of its instance whose links the calls use."""
    interrupted: bool = False
    """By a fault of a link: once its calls have come back, it waits for its instance again."""
    faults: int = 0
    """Of links, in calls of its own."""
    failure: Failure | None = None
    cancelled: bool = False
    num_bytes: int = 0
    transport: Transport = Transport.OTHER
    queued_s: float = 0.0
    run_s: float = 0.0
    """Of the slowest call: they run beside or after one another."""

    @property
    def is_over(self) -> bool:
        """Nothing more comes of it; at most its calls have still to come back."""
        return self.cancelled or self.failure is not None

    @property
    def num_blocks(self) -> int:
        return sum(block != NULL_BLOCK for group in self.job.local_blocks for block in group)


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

    def put(self, job: PullJob, failed: bool) -> None:
        with self._lock:
            self._finished.received.add(job.request_id)
            if failed:
                self._finished.failed.add(job.request_id)
                for group in job.local_blocks:
                    # The null block is in the tables of other requests, too: they would all be recomputed.
                    self._finished.invalid_blocks.update(block for block in group if block != NULL_BLOCK)

    def take(self) -> FinishedPulls:
        with self._lock:
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

    def add(self, job: PullJob, instance: Instance, deadline: float) -> Transfer:
        transfer = Transfer(job, instance, accepted_at=time.monotonic(), deadline=deadline)
        self._by_request[job.request_id] = transfer
        return transfer

    def get(self, request_id: str) -> Transfer | None:
        return self._by_request.get(request_id)

    def add_call(self, transfer: Transfer, call_id: int) -> None:
        transfer.calls.add(call_id)
        self._by_call[call_id] = transfer

    def take_call(self, call_id: int) -> Transfer | None:
        transfer = self._by_call.pop(call_id, None)
        if transfer is not None:
            transfer.calls.discard(call_id)
        return transfer

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

    def instances(self) -> set[Instance]:
        """Those that some transfer needs."""
        return {transfer.instance for transfer in self._by_request.values()}

    def overdue(self, now: float) -> list[Transfer]:
        return [t for t in self._by_request.values() if not t.is_over and t.deadline <= now]

    def next_deadline(self) -> float | None:
        """May have passed already. One that is over waits for its running calls, not for time."""
        return min((t.deadline for t in self._by_request.values() if not t.is_over), default=None)
