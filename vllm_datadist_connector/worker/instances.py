"""Instances and peers: what is known of an engine core that we pull from, and of each of its worker ranks.

One object per instance and one per rank hold all of it; dropping the instance drops it all. `peers.py` fills them in.
"""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field
from typing import NamedTuple

from vllm_datadist_connector.labels import Transport
from vllm_datadist_connector.protocol.handshake import RankGeometry
from vllm_datadist_connector.side_channel.endpoint import Endpoint
from vllm_datadist_connector.worker.pairing import Pairing, Rank

MAX_FAULTS = 8
"""In a row: what does not work so often, over links each made anew, is no passing fault."""
_FIRST_PAUSE_S = 0.05
_AFTER_DEADLINE_S = 0.1


def pause_s(faults: int, most_s: float, spread: float) -> float:
    """Until an instance is met anew after so many faults in a row: twice as long each time, at most `most_s`.

    Args:
        spread: from 0 to 1, by chance: ranks that lost one P at the same moment are not to come back at the same.
    """
    return min(most_s, _FIRST_PAUSE_S * 2.0 ** min(faults - 1, 30)) * (1.0 - spread / 2)


class InstanceState(enum.Enum):
    MEETING = enum.auto()
    READY = enum.auto()
    RESTING = enum.auto()
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
    link: Transport | None = None
    """By which it is linked."""

    @property
    def settled(self) -> bool:
        return self.geometry is not None and (self.link is not None or not self.pairings)


@dataclass(slots=True, eq=False)
class Instance:
    key: InstanceKey
    met_at: float
    last_used: float
    state: InstanceState = InstanceState.MEETING
    peers: dict[Rank, Peer] = field(default_factory=dict)
    reason: str = ""
    """Why it is RESTING or BROKEN."""
    failed_step: str = ""
    """handshake or link, for the metrics."""
    faults: int = 0
    """Of its links, one after another, with no pull that succeeded in between."""
    meeting: int = 0
    """How often it was met: a fault of a link of an earlier time says nothing of the present ones."""
    again_at: float = 0.0
    """When a RESTING one is met anew."""
    waiting: list[str] = field(default_factory=list)
    """Requests to start once READY, to fail once BROKEN."""
    wanted_until: float = 0.0
    """The last of their deadlines."""
    is_ourselves: bool = False

    @property
    def is_proven(self) -> bool:
        """Whether somebody has answered as who it is said to be."""
        known = any(peer.geometry is not None for peer in self.peers.values())
        return known or self.state is not InstanceState.MEETING

    def within(self, limit_s: float) -> float:
        """`limit_s`, or until just after the last deadline of those who wait: it is that which ends them."""
        return min(limit_s, max(0.0, self.wanted_until - time.monotonic()) + _AFTER_DEADLINE_S)

    def is_meeting(self, peer: Peer) -> bool:
        """Whether what is heard of the peer is of the meeting that goes on, and not of one that was given up."""
        return self.state is InstanceState.MEETING and self.peers.get(peer.rank) is peer

    @property
    def transport(self) -> Transport:
        """By which its blocks come."""
        if self.is_ourselves:
            return Transport.OWN
        links = {peer.link for peer, _ in self.givers}
        return (links.pop() if len(links) == 1 else None) or Transport.OTHER

    @property
    def givers(self) -> list[tuple[Peer, RankGeometry]]:
        """The ranks that hold KV of ours, with their geometries."""
        return [(p, p.geometry) for p in self.peers.values() if p.pairings and p.geometry is not None]
