"""Peers: one object per remote worker rank holds all that is known of it; dropping the object drops it all.

    GREETING ──Meta, compatible──> LINKING ──linked──> READY
        └──────────┬──────────────────┴───────────────────┘ any failure
                   └──> BROKEN (new requests fail at once until retry_at, then the peer is met anew)

Belongs to the driver thread. Side channel and transfer queue are asked, never waited for.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from vllm_datadist_connector import _native
from vllm_datadist_connector.protocol.handshake import RankGeometry, find_mismatches
from vllm_datadist_connector.protocol.messages import Hello, Meta, Refused
from vllm_datadist_connector.protocol.params import RemotePrefill
from vllm_datadist_connector.side_channel.client import Answer, SideChannelClient
from vllm_datadist_connector.side_channel.endpoint import Endpoint

logger = logging.getLogger(__name__)

MAX_PEERS = 1024


class PeerState(enum.Enum):
    GREETING = enum.auto()
    LINKING = enum.auto()
    READY = enum.auto()
    BROKEN = enum.auto()


class PeerKey(NamedTuple):
    """One life of one P; our own rank decides which of its workers is meant."""

    endpoint: Endpoint
    engine_id: str
    incarnation: str


@dataclass(slots=True)
class Peer:
    key: PeerKey
    met_at: float
    state: PeerState = PeerState.GREETING
    geometry: RankGeometry | None = None
    reason: str = ""
    """Why it is BROKEN."""
    failed_step: str = ""
    """handshake or link, for the metrics."""
    retry_at: float = 0.0
    waiting: list[str] = field(default_factory=list)
    """Requests to start once READY, to fail once BROKEN."""


class PeerTable:
    def __init__(
        self,
        ours: RankGeometry,
        client: SideChannelClient,
        queue: _native.TransferQueue,
        link_report: Callable[[int], _native.LinkReport | None],
        allows_peer: Callable[[str], bool],
        handshake_timeout_s: float,
        link_timeout_s: float,
        backoff_s: float,
    ) -> None:
        self._ours = ours
        self._client = client
        self._queue = queue
        self._link_report = link_report
        self._allows_peer = allows_peer
        self._handshake_timeout_s = handshake_timeout_s
        self._link_timeout_s = link_timeout_s
        self._backoff_s = backoff_s
        self._peers: dict[PeerKey, Peer] = {}
        self._greetings: dict[int, Peer] = {}
        self._links: dict[int, Peer] = {}
        self._unlinks: set[int] = set()

    def linked(self) -> int:
        return sum(peer.state is PeerState.READY for peer in self._peers.values())

    def meet(self, remote: RemotePrefill) -> Peer:
        """The peer that granted a lease; an unknown one is greeted."""
        key = PeerKey(
            Endpoint(remote.remote_host, remote.remote_port), remote.remote_engine_id, remote.ticket.incarnation
        )
        now = time.monotonic()
        self._forget_broken(now)
        peer = self._peers.get(key)
        if peer is not None and peer.state is PeerState.READY and not self.is_linked(peer):
            # Lost while nobody used it: worth a new link, not a failed request.
            self.broke(peer, f"link with {key.endpoint} was lost; linking again", "link")
            peer = None
        if peer is None:
            self._forget_dead()
            peer = Peer(key, met_at=now)
            if len(self._peers) >= MAX_PEERS:
                peer.state, peer.reason = PeerState.BROKEN, f"more than {MAX_PEERS} peers"
                peer.failed_step = "handshake"
                return peer
            self._peers[key] = peer
            self._greet(peer)
        return peer

    def on_answer(self, answer: Answer) -> Peer | None:
        """Takes the answer to a greeting; None if it is somebody else's."""
        peer = self._greetings.pop(answer.id, None)
        if peer is None or peer.state is not PeerState.GREETING:
            return peer
        if isinstance(answer.response, Meta):
            self._on_meta(peer, answer.response)
        else:
            reason = answer.response.reason if isinstance(answer.response, Refused) else answer.error
            self.broke(peer, f"handshake with {peer.key.endpoint}: {reason}", "handshake")
        return peer

    def on_completion(self, completion: _native.Completion) -> Peer | None:
        """Takes the end of a link or unlink call; None if it is somebody else's."""
        if completion.id in self._unlinks:
            self._unlinks.discard(completion.id)
            return None
        peer = self._links.pop(completion.id, None)
        if peer is None or peer.state is not PeerState.LINKING:
            return peer
        if completion.status in (_native.LLM_SUCCESS, _native.LLM_ALREADY_LINK):
            peer.state = PeerState.READY
            self._log_link(peer)
        else:
            name = _native.status_name(completion.status)
            self.broke(peer, f"link with {peer.key.endpoint}: {name}: {completion.error}", "link")
        return peer

    def broke(self, peer: Peer, reason: str, step: str) -> None:
        """Drops the peer's link; whoever asks for it before retry_at is told `reason`."""
        if peer.state is PeerState.BROKEN:
            return
        logger.warning("%s", reason)
        if peer.geometry is not None and peer.state in (PeerState.LINKING, PeerState.READY):
            # The link must be gone before the next one to the same cluster is made.
            with contextlib.suppress(_native.QueueFullError):
                self._unlinks.add(self._queue.submit_unlink(self._cluster(peer.geometry), 1000, 60_000, True))
        peer.state, peer.reason, peer.failed_step = PeerState.BROKEN, reason, step
        peer.retry_at = time.monotonic() + self._backoff_s

    def take_waiting(self, peer: Peer) -> list[str]:
        waiting, peer.waiting = peer.waiting, []
        return waiting

    def _greet(self, peer: Peer) -> None:
        def hello(request_id: int) -> Hello:
            return Hello(
                id=request_id,
                engine_id=peer.key.engine_id,
                incarnation=peer.key.incarnation,
                pp_rank=self._ours.pp_rank,
                tp_rank=self._ours.tp_rank,
            )

        self._greetings[self._client.send(peer.key.endpoint, hello, self._handshake_timeout_s)] = peer

    def _on_meta(self, peer: Peer, meta: Meta) -> None:
        try:
            geometry = msgspec.msgpack.decode(meta.geometry, type=RankGeometry)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self.broke(peer, f"handshake with {peer.key.endpoint}: geometry: {error}", "handshake")
            return
        mismatches = find_mismatches(self._ours, geometry)
        if not geometry.port:
            mismatches.append("P's engine does not listen: its kv_role is kv_consumer")
        if not self._allows_peer(geometry.host):
            mismatches.append(f"host of P's engine: {geometry.host!r} is not among allowed_peers")
        if mismatches:
            self.broke(peer, f"{peer.key.endpoint} is not compatible: {'; '.join(mismatches)}", "handshake")
            return
        peer.geometry = geometry
        peer.state = PeerState.LINKING
        timeout_ms = int(self._link_timeout_s * 1000)
        try:
            self._links[self._queue.submit_link(self._cluster(geometry), timeout_ms, timeout_ms + 60_000)] = peer
        except _native.QueueFullError as error:
            self.broke(peer, f"link with {peer.key.endpoint}: {error}", "link")

    def is_linked(self, peer: Peer) -> bool:
        report = self._link_report(peer.geometry.cluster_id) if peer.geometry is not None else None
        return report is not None and report.alive

    def _log_link(self, peer: Peer) -> None:
        report = self._link_report(peer.geometry.cluster_id) if peer.geometry is not None else None
        how = report.transport if report is not None else "?"
        why = f" ({report.transport_reason})" if report is not None and report.transport_reason else ""
        milliseconds = (time.monotonic() - peer.met_at) * 1000
        logger.info("linked with %s by %s%s in %.0f ms", peer.key.endpoint, how, why, milliseconds)

    def _cluster(self, geometry: RankGeometry) -> _native.ClusterInfo:
        return _native.ClusterInfo(
            remote_cluster_id=geometry.cluster_id,
            remote_ip_infos=[(geometry.host, geometry.port)],
            local_ip_infos=[(self._ours.host, 0)],
        )

    def _forget_dead(self) -> None:
        """Breaks peers whose link is gone: a P that restarts is a new peer each time, and they would add up."""
        for peer in self._peers.values():
            if peer.state is PeerState.READY and not self.is_linked(peer):
                self.broke(peer, f"link with {peer.key.endpoint} was lost", "link")

    def _forget_broken(self, now: float) -> None:
        for key, peer in list(self._peers.items()):
            if peer.state is PeerState.BROKEN and peer.retry_at <= now and not peer.waiting:
                del self._peers[key]
