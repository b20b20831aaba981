"""InstanceTable: meets the engine cores that we pull from, and links with each of their worker ranks.

    MEETING ── every rank that has KV of ours: greeted, paired, linked ──> READY ── unused for peer_ttl_s ──> (gone)
     │ │  ▲                                                                  │
     │ └──┼── a link is not to be had, or is lost ──> RESTING ──> MEETING <──┘
     │    └── no answer in time                          │
     └── refused, or nobody is there ──> BROKEN, and gone, with whoever waits for it <── so many faults in a row

Whoever waits for an instance waits until its own deadline. A peer that has not answered in time may be busy: it is
greeted, or linked with, again. After a fault of a link it is met anew after a pause, which grows with the faults: the
greeting tells whether it lives. A refusal, or nobody there, is known at once, and is not remembered: the requests that
waited share it, and the next one asks again.

An instance is met with its rank (0, 0), whose geometry tells how many ranks there are; nothing about the other side is
configured, and nothing that a router said decides whom we greet.

Belongs to the driver thread. Side channel and transfer queue are asked, never waited for.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import msgspec

from vllm_datadist_connector import _native
from vllm_datadist_connector.log_filter import OthersWords
from vllm_datadist_connector.protocol.contract import are_weights_comparable, find_mismatches
from vllm_datadist_connector.protocol.handshake import RankGeometry, decode_geometry
from vllm_datadist_connector.protocol.params import RemotePrefill
from vllm_datadist_connector.side_channel.client import ChannelAnswer, ChannelClient, RankDescription, Refused
from vllm_datadist_connector.side_channel.endpoint import Endpoint
from vllm_datadist_connector.worker.instances import MAX_FAULTS, Instance, InstanceKey, InstanceState, Peer, pause_s
from vllm_datadist_connector.worker.pairing import (
    ANY,
    MismatchError,
    Rank,
    Terms,
    find_gaps,
    pair,
    pair_with_itself,
    sources,
)

logger = logging.getLogger(__name__)
logger.addFilter(OthersWords())

MAX_INSTANCES = 1024
MAX_UNPROVEN = 256
"""Of those that have not answered as who they are said to be: a client can make up any number of them."""
MAX_RANKS = 512
"""Of one instance that we would link with: an instance says itself how many it has."""

_FIRST = Rank(0, 0)
_LINK_PAUSE_S = 0.02
"""Until the next try of a link that its other end is just making as well, or has not answered."""
_LINK_AGAIN = frozenset({_native.LLM_PROCESSING_LINK, _native.LLM_TIMEOUT})
"""Codes after which the same call may succeed."""
_LINK_REFUSED = frozenset({_native.LLM_PARAM_INVALID, _native.LLM_FEATURE_NOT_ENABLED})
"""Codes after which no later call would."""
_AFTER_DEADLINE_S = 0.1
_UNLINK_TIMEOUT_MS = 1000
_QUEUED_MS = 60_000
"""A link or unlink call may wait so long for its turn behind pulls."""


class Linking(NamedTuple):
    """A link that is being made."""

    instance: Instance
    peer: Peer
    geometry: RankGeometry


class InstanceTable:
    def __init__(
        self,
        ours: RankGeometry,
        client: ChannelClient,
        queue: _native.TransferQueue,
        link_report: Callable[[int], _native.LinkReport | None],
        allows_peer: Callable[[str], bool],
        handshake_timeout_s: float,
        link_timeout_s: float,
        backoff_s: float,
        ttl_s: float,
        may_differ: Collection[str],
        terms: Terms = ANY,
    ) -> None:
        self._ours = ours
        self._terms = terms
        self._may_differ = may_differ
        self._client = client
        self._queue = queue
        self._link_report = link_report
        self._allows_peer = allows_peer
        self._handshake_timeout_s = handshake_timeout_s
        self._link_timeout_s = link_timeout_s
        self._backoff_s = backoff_s
        self._ttl_s = ttl_s
        self._instances: dict[InstanceKey, Instance] = {}
        self._greetings: dict[int, tuple[Instance, Peer]] = {}
        self._links: dict[int, Linking] = {}
        self._links_again: deque[tuple[float, Linking]] = deque()
        """What to try again, and when; the earliest first."""
        self._changed: list[Instance] = []

    def linked(self) -> int:
        """Worker ranks that we are linked with."""
        return sum(peer.linked for each in self._instances.values() for peer in each.peers.values())

    def meet(self, remote: RemotePrefill, deadline: float, is_ourselves: bool = False) -> Instance:
        """The instance that granted a lease; an unknown one is greeted, unless it is our own.

        Args:
            deadline: how long the caller may wait for it, in time.monotonic().
        """
        key = InstanceKey(
            Endpoint(remote.remote_host, remote.remote_port), remote.remote_engine_id, remote.ticket.incarnation
        )
        now = time.monotonic()
        instance = self._instances.get(key)
        if instance is not None:
            instance.last_used, instance.wanted_until = now, max(instance.wanted_until, deadline)
            if instance.state is InstanceState.READY and not self.is_linked(instance):
                logger.warning("link with %s was lost; linking again", key.endpoint)
                self._unlink(instance)
                self._meet(instance)
        else:
            instance = Instance(key, met_at=now, last_used=now, wanted_until=deadline)
            self._make_room()
            if len(self._instances) >= MAX_INSTANCES + MAX_UNPROVEN:
                instance.state, instance.reason = InstanceState.BROKEN, f"more than {MAX_INSTANCES} instances"
                instance.failed_step = "handshake"
                return instance
            self._instances[key] = instance
            if is_ourselves:
                self._know_ourselves(instance)
            else:
                self._meet(instance)
        return instance

    def on_answer(self, answer: ChannelAnswer) -> bool:
        """Takes the answer to a greeting; False if it is somebody else's."""
        greeted = self._greetings.pop(answer.id, None)
        if greeted is None:
            return False
        instance, peer = greeted
        if not instance.is_meeting(peer):
            return True
        if isinstance(answer.response, RankDescription):
            self._on_description(instance, peer, answer.response)
        elif answer.timed_out and time.monotonic() < instance.wanted_until:
            logger.info("%s has not answered our greeting: we ask again", instance.key.endpoint)
            self._greet(instance, peer.rank)
        else:
            reason = answer.response.reason if isinstance(answer.response, Refused) else answer.error
            self.broke(instance, f"handshake with {instance.key.endpoint}: {reason}", "handshake")
        return True

    def on_completion(self, completion: _native.Completion) -> None:
        """Takes the end of a link or unlink call."""
        linking = self._links.pop(completion.id, None)
        if linking is None:
            return
        instance, peer = linking.instance, linking.peer
        if not instance.is_meeting(peer):
            return
        now = time.monotonic()
        if completion.status in (_native.LLM_SUCCESS, _native.LLM_ALREADY_LINK):
            peer.linked = True
            self._log_link(instance, peer)
            self._settle(instance)
            return
        name = _native.status_name(completion.status)
        reason = f"link with {instance.key.endpoint}: {name}: {completion.error}"
        if completion.status in _LINK_AGAIN and now < instance.wanted_until:
            # A busy peer, or two that meet each other at once: the one that is refused soon finds the other's link.
            logger.debug("link with %s: %s: we try again", instance.key.endpoint, name)
            self._links_again.append((now + _LINK_PAUSE_S, linking))
        elif completion.status in _LINK_REFUSED:
            self.broke(instance, reason, "link")
        else:
            self.rest(instance, reason)

    def take_changed(self) -> list[Instance]:
        """Instances that have become READY or BROKEN since the last call."""
        changed, self._changed = self._changed, []
        return changed

    def broke(self, instance: Instance, reason: str, step: str) -> None:
        """Drops the instance and its links; whoever waits for it is told `reason`."""
        if instance.state is InstanceState.BROKEN:
            return
        logger.warning("%s", reason)
        self._unlink(instance)
        instance.state, instance.reason, instance.failed_step = InstanceState.BROKEN, reason, step
        self._instances.pop(instance.key, None)
        self._changed.append(instance)

    def rest(self, instance: Instance, reason: str) -> None:
        """A link failed: drops all of them, and meets the instance anew after a while; whoever waits for it goes on."""
        if instance.state in (InstanceState.BROKEN, InstanceState.RESTING):
            return
        instance.faults += 1
        if instance.faults >= MAX_FAULTS:
            self.broke(instance, f"{reason} ({instance.faults} times in a row)", "link")
            return
        pause = pause_s(instance.faults, self._backoff_s, random.random())  # noqa: S311
        logger.warning("%s; linking again in %.2f s", reason, pause)
        self._unlink(instance)
        instance.state, instance.reason = InstanceState.RESTING, reason
        instance.again_at = time.monotonic() + pause

    def take_waiting(self, instance: Instance) -> list[str]:
        waiting, instance.waiting = instance.waiting, []
        return waiting

    def is_linked(self, instance: Instance) -> bool:
        if instance.is_ourselves:
            return True
        reports = [self._link_report(geometry.cluster_id) for _, geometry in instance.givers]
        return all(report is not None and report.alive for report in reports)

    def drop_unused(self, now: float, busy: Collection[Instance]) -> None:
        """Unlinks instances that nobody has asked for in a while, or that are gone: they would add up."""
        for key, instance in list(self._instances.items()):
            if instance in busy:
                instance.last_used = now
            elif instance.state is InstanceState.READY:
                idle_s = now - instance.last_used
                lost = not self.is_linked(instance)
                if lost or idle_s >= self._ttl_s:
                    logger.info(
                        "unlinked from %s: %s", key.endpoint, "it is gone" if lost else f"unused for {idle_s:.0f} s"
                    )
                    self._unlink(instance)
                    del self._instances[key]

    def try_again(self, now: float, busy: Collection[Instance]) -> None:
        """Links, and meets instances, once more where that may succeed now and somebody waits for it."""
        while self._links_again and self._links_again[0][0] <= now:
            _, linking = self._links_again.popleft()
            if linking.instance.is_meeting(linking.peer):
                self._link(linking)
        for instance in list(self._instances.values()):
            if instance.state is InstanceState.RESTING and instance.again_at <= now:
                if instance in busy:
                    self._meet(instance)
                else:
                    del self._instances[instance.key]

    def next_wake(self) -> float | None:
        """When there is something to try again, or the next instance may be idle for too long."""
        wakes = [at for at, _ in self._links_again]
        for instance in self._instances.values():
            if instance.state is InstanceState.READY:
                wakes.append(instance.last_used + self._ttl_s)
            elif instance.state is InstanceState.RESTING:
                wakes.append(instance.again_at)
        return min(wakes, default=None)

    def _make_room(self) -> None:
        """For one more that is unproven. A real one answers within milliseconds, so the oldest is the least to lose."""
        unproven = [each for each in self._instances.values() if not each.is_proven]
        if len(unproven) >= MAX_UNPROVEN:
            oldest = min(unproven, key=lambda each: each.met_at)
            reason = f"{oldest.key.endpoint} has not answered, and too many others are said to be instances"
            self.broke(oldest, reason, "handshake")

    def _know_ourselves(self, instance: Instance) -> None:
        """Every rank has all that it needs itself: nobody to greet, nothing to link."""
        rank = Rank(self._ours.pp_rank, self._ours.tp_rank)
        instance.peers[rank] = Peer(rank, self._ours, pair_with_itself(self._ours))
        instance.state, instance.is_ourselves = InstanceState.READY, True

    def _meet(self, instance: Instance) -> None:
        """From the beginning: the links of an earlier meeting are gone."""
        instance.state, instance.met_at = InstanceState.MEETING, time.monotonic()
        instance.meeting += 1
        instance.peers = {}
        self._greet(instance, _FIRST)

    def _greet(self, instance: Instance, rank: Rank) -> None:
        peer = instance.peers[rank] = Peer(rank)
        key = instance.key
        timeout_s = self._within(self._handshake_timeout_s, instance)
        sent = self._client.describe_rank(
            key.endpoint, key.engine_id, key.incarnation, rank.pp_rank, rank.tp_rank, timeout_s
        )
        self._greetings[sent] = (instance, peer)

    def _on_description(self, instance: Instance, peer: Peer, description: RankDescription) -> None:
        try:
            geometry = decode_geometry(description.geometry)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self.broke(instance, f"handshake with {instance.key.endpoint}: geometry: {error}", "handshake")
            return
        mismatches = self._mismatches(instance, peer, geometry)
        if not mismatches:
            try:
                peer.pairings = pair(self._ours, geometry, self._terms)
            except MismatchError as error:
                mismatches.append(str(error))
        if mismatches:
            self._refuse(instance, mismatches)
            return
        peer.geometry = geometry
        if peer.rank == _FIRST:
            if not are_weights_comparable(self._ours.contract, geometry.contract):
                weights = (each.contract.weights or "not known" for each in (self._ours, geometry))
                logger.warning(
                    "whether %s has our weights is not checked: ours %s, theirs %s", instance.key.endpoint, *weights
                )
            for rank in sources(self._ours, geometry.tp_size, geometry.pp_size):
                if rank not in instance.peers:
                    self._greet(instance, rank)
        if peer.pairings:
            self._link(Linking(instance, peer, geometry))
        if instance.state is InstanceState.MEETING:
            self._settle(instance)

    def _mismatches(self, instance: Instance, peer: Peer, theirs: RankGeometry) -> list[str]:
        found = find_mismatches(self._ours.contract, theirs.contract, self._may_differ)
        if (theirs.pp_rank, theirs.tp_rank) != peer.rank:
            found.append(f"(pp, tp) rank: asked for {tuple(peer.rank)}, got {(theirs.pp_rank, theirs.tp_rank)}")
        if not theirs.port:
            found.append("P's engine does not listen: its kv_role is kv_consumer")
        if not self._allows_peer(theirs.host):
            found.append(f"host of P's engine: {theirs.host!r} is not among allowed_peers")
        if any(theirs.cluster_id == geometry.cluster_id for geometry in self._others(instance)):
            # LinkLlmClusters would say that it is linked already: with another P.
            found.append(f"cluster id {theirs.cluster_id} is that of another instance's rank")
        first = instance.peers[_FIRST].geometry or theirs
        sizes, first_sizes = (theirs.pp_size, theirs.tp_size), (first.pp_size, first.tp_size)
        if sizes != first_sizes:
            found.append(f"(pp, tp) size: rank (0, 0) says {first_sizes}, {tuple(peer.rank)} says {sizes}")
        elif peer.rank == _FIRST and sizes[0] * sizes[1] > MAX_RANKS:
            found.append(f"(pp, tp) size: {sizes}, at most {MAX_RANKS} ranks are met")
        return found

    def _others(self, instance: Instance) -> Iterator[RankGeometry]:
        """Geometries of every rank that we are, or that is about to be, linked with, but for those of `instance`."""
        yield self._ours
        for other in self._instances.values():
            if other is not instance and other.state is not InstanceState.BROKEN:
                yield from (geometry for _, geometry in other.givers)

    def _refuse(self, instance: Instance, mismatches: list[str]) -> None:
        self.broke(instance, f"{instance.key.endpoint} is not compatible: {'; '.join(mismatches)}", "handshake")

    def _link(self, linking: Linking) -> None:
        timeout_ms = max(1, int(self._within(self._link_timeout_s, linking.instance) * 1000))
        try:
            call = self._queue.submit_link(self._cluster(linking.geometry), timeout_ms, timeout_ms + _QUEUED_MS)
        except _native.QueueFullError as error:
            self.rest(linking.instance, f"link with {linking.instance.key.endpoint}: {error}")
        else:
            self._links[call] = linking

    @staticmethod
    def _within(limit_s: float, instance: Instance) -> float:
        """`limit_s`, or until just after the last deadline of those who wait: it is that which ends them."""
        return min(limit_s, max(0.0, instance.wanted_until - time.monotonic()) + _AFTER_DEADLINE_S)

    def _settle(self, instance: Instance) -> None:
        """READY once every rank is known and linked, if together they have all that is ours."""
        if not all(peer.settled for peer in instance.peers.values()):
            return
        gaps = find_gaps(self._ours, [each for peer in instance.peers.values() for each in peer.pairings])
        if gaps:
            more = f", and {len(gaps) - 1} more" if len(gaps) > 1 else ""
            self._refuse(instance, [f"{gaps[0]}{more}"])
            return
        instance.state = InstanceState.READY
        self._changed.append(instance)
        # Only now is it proven that the address has a new tenant: a client could have made up the incarnation.
        for other in list(self._instances.values()):
            if other.key.endpoint == instance.key.endpoint and other is not instance:
                self.broke(other, f"{other.key.endpoint}: another instance lives there now", "handshake")

    def _unlink(self, instance: Instance) -> None:
        """The links must be gone before the next ones to the same clusters are made."""
        linking = {id(each.peer) for each in self._links.values()}
        for peer, geometry in instance.givers:
            if peer.linked or id(peer) in linking:
                with contextlib.suppress(_native.QueueFullError):
                    self._queue.submit_unlink(self._cluster(geometry), _UNLINK_TIMEOUT_MS, _QUEUED_MS, True)
            peer.linked = False

    def _log_link(self, instance: Instance, peer: Peer) -> None:
        report = self._link_report(peer.geometry.cluster_id) if peer.geometry is not None else None
        how = report.transport if report is not None else "?"
        why = f" ({report.transport_reason})" if report is not None and report.transport_reason else ""
        milliseconds = (time.monotonic() - instance.met_at) * 1000
        rank = f"rank (pp {peer.rank.pp_rank}, tp {peer.rank.tp_rank}) of {instance.key.endpoint}"
        logger.info("linked with %s by %s%s in %.0f ms", rank, how, why, milliseconds)

    def _cluster(self, geometry: RankGeometry) -> _native.ClusterInfo:
        return _native.ClusterInfo(
            remote_cluster_id=geometry.cluster_id,
            remote_ip_infos=[(geometry.host, geometry.port)],
            local_ip_infos=[(self._ours.host, 0)],
        )
