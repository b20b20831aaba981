"""LeaseTable: P's promises to keep finished requests' blocks, the only place that knows which still stand.

    grant ──> held ──┬── release (D is done, or will never come)
                     └── expiry (no renewal for its duration, or lease_limit_s after the grant)

A lease leaves the table *before* its blocks go back to vLLM, so a confirmation that succeeds proves that the blocks
were the request's own until then. Called by the scheduler thread and by the side channel's.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from vllm_datadist_connector.protocol.params import BlockIds, LeaseTicket
from vllm_datadist_connector.protocol.version import PROTOCOL_VERSION


class EndedLease(NamedTuple):
    request_id: str
    why: str
    """released or expired"""


@dataclass(slots=True)
class _Lease:
    request_id: str
    generation: int
    blocks: BlockIds
    prompt_digest: str
    lease_s: float
    expires: float
    limit: float


class LeaseTable:
    """Leases by their random token."""

    def __init__(
        self,
        incarnation: str,
        block_sizes: tuple[int, ...],
        limit_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._incarnation = incarnation
        self._block_sizes = block_sizes
        self._limit_s = limit_s
        self._clock = clock
        self._lock = threading.Lock()
        self._leases: dict[str, _Lease] = {}
        self._ended: list[EndedLease] = []
        self._generation = 0
        self._refused_confirms = 0
        self._next_expiry = math.inf
        """No lease expires before it; a lower bound, because take_ended() runs in every step."""

    def grant(self, request_id: str, blocks: BlockIds, prompt_digest: str, lease_s: float) -> LeaseTicket:
        """Keeps a request's blocks until `lease_s` pass without a renewal."""
        now = self._clock()
        token = secrets.token_hex(16)
        with self._lock:
            self._generation += 1
            self._leases[token] = _Lease(
                request_id=request_id,
                generation=self._generation,
                blocks=blocks,
                prompt_digest=prompt_digest,
                lease_s=lease_s,
                expires=now + lease_s,
                limit=now + max(lease_s, self._limit_s),
            )
            self._next_expiry = min(self._next_expiry, now + lease_s)
            return LeaseTicket(
                version=PROTOCOL_VERSION,
                incarnation=self._incarnation,
                token=token,
                generation=self._generation,
                lease_s=lease_s,
                prompt_digest=prompt_digest,
                block_sizes=self._block_sizes,
            )

    def confirm(self, token: str, generation: int, prompt_digest: str, blocks: BlockIds) -> str:
        """Empty if the lease stands, for this prompt and these blocks; otherwise why the read does not count."""
        with self._lock:
            self._expire(self._clock())
            lease = self._leases.get(token)
            if lease is None or lease.generation != generation:
                reason = "the lease has ended or never was"
            elif lease.prompt_digest != prompt_digest:
                reason = "the lease is for another prompt"
            elif lease.blocks != blocks:
                reason = "the lease is for other blocks, or for these in another order"
            else:
                return ""
            self._refused_confirms += 1
            return reason

    def renew(self, tokens: Iterable[str]) -> tuple[str, ...]:
        """Extends leases by their duration from now, within their limit; returns the tokens that name none."""
        now = self._clock()
        gone = []
        with self._lock:
            self._expire(now)
            for token in tokens:
                lease = self._leases.get(token)
                if lease is None:
                    gone.append(token)
                else:
                    lease.expires = min(now + lease.lease_s, lease.limit)
        return tuple(gone)

    def release(self, tokens: Iterable[str]) -> None:
        with self._lock:
            self._expire(self._clock())
            for token in tokens:
                self._end(token, "released")

    def take_ended(self) -> list[EndedLease]:
        """Leases that ended since the last call, each once."""
        with self._lock:
            self._expire(self._clock())
            ended, self._ended = self._ended, []
            return ended

    def take_refused_confirms(self) -> int:
        """Confirmations that were refused since the last call."""
        with self._lock:
            refused, self._refused_confirms = self._refused_confirms, 0
            return refused

    def held(self) -> tuple[int, int]:
        """(leases, blocks) that are held now."""
        with self._lock:
            blocks = (group for lease in self._leases.values() for group in lease.blocks)
            return len(self._leases), sum(sum(1 for block in group if block) for group in blocks)

    def _expire(self, now: float) -> None:
        if now < self._next_expiry:
            return
        for token in [token for token, lease in self._leases.items() if lease.expires <= now]:
            self._end(token, "expired")
        self._next_expiry = min((lease.expires for lease in self._leases.values()), default=math.inf)

    def _end(self, token: str, why: str) -> None:
        lease = self._leases.pop(token, None)
        if lease is not None:
            self._ended.append(EndedLease(lease.request_id, why))
