"""Instances and peers: what is known of an engine core that we pull from, and of each of its worker ranks.

One object per instance and one per rank hold all of it; dropping the instance drops it all. `peers.py` fills them in.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

from vllm_datadist_connector.protocol.handshake import RankGeometry
from vllm_datadist_connector.side_channel.endpoint import Endpoint
from vllm_datadist_connector.worker.pairing import Pairing, Rank


class InstanceState(enum.Enum):
    MEETING = enum.auto()
    READY = enum.auto()
    BROKEN = enum.auto()


class InstanceKey(NamedTuple):
    """One life of one engine core of P."""

    endpoint: Endpoint
    engine_id: str
    incarnation: str


@dataclass(slots=True)
class Peer:
    """One worker rank of P."""

    rank: Rank
    geometry: RankGeometry | None = None
    pairings: list[Pairing] = field(default_factory=list)
    """What it gives us; a rank that gives nothing is not linked."""
    linked: bool = False

    @property
    def settled(self) -> bool:
        return self.geometry is not None and (self.linked or not self.pairings)


@dataclass(slots=True, eq=False)
class Instance:
    key: InstanceKey
    met_at: float
    last_used: float
    state: InstanceState = InstanceState.MEETING
    peers: dict[Rank, Peer] = field(default_factory=dict)
    reason: str = ""
    """Why it is BROKEN."""
    failed_step: str = ""
    """handshake or link, for the metrics."""
    retry_at: float = 0.0
    waiting: list[str] = field(default_factory=list)
    """Requests to start once READY, to fail once BROKEN."""
    wanted_until: float = 0.0
    """The last of their deadlines."""
    is_ourselves: bool = False

    @property
    def givers(self) -> list[tuple[Peer, RankGeometry]]:
        """The ranks that hold KV of ours, with their geometries."""
        return [(p, p.geometry) for p in self.peers.values() if p.pairings and p.geometry is not None]
