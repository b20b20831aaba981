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

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator

import msgspec

from vllm_datadist_connector import _native
from vllm_datadist_connector.labels import Transport
from vllm_datadist_connector.log_filter import OthersWords
from vllm_datadist_connector.protocol.contract import are_weights_comparable, find_mismatches
from vllm_datadist_connector.protocol.handshake import RankGeometry, decode_geometry
from vllm_datadist_connector.protocol.params import RemotePrefill
from vllm_datadist_connector.side_channel.client import ChannelAnswer, ChannelClient, RankDescription, Refused
from vllm_datadist_connector.side_channel.endpoint import Endpoint
from vllm_datadist_connector.worker.instances import MAX_FAULTS, Instance, InstanceKey, InstanceState, Peer, pause_s
from vllm_datadist_connector.worker.links import Linking, Links
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
_LINK_AGAIN = frozenset({_native.LLM_PROCESSING_LINK, _native.LLM_TIMEOUT})
"""Codes after which the same call may succeed."""
_LINK_REFUSED = frozenset({_native.LLM_PARAM_INVALID, _native.LLM_FEATURE_NOT_ENABLED})
"""Codes after which no later call would."""


class InstanceTable:
    def __init__(
        self,
        ours: RankGeometry,
        client: ChannelClient,
        links: Links,
        busy: Callable[[], Collection[Instance]],
        allows_peer: Callable[[str], bool],
        handshake_timeout_s: float,
        backoff_s: float,
        ttl_s: float,
        may_differ: Collection[str],
        terms: Terms = ANY,
    ) -> None:
        """
        Args:
            busy: the instances that some transfer needs.
        """
        self._ours = ours
        self._terms = terms
        self._may_differ = may_differ
        self._client = client
        self._links = links
        self._busy = busy
        self._allows_peer = allows_peer
        self._handshake_timeout_s = handshake_timeout_s
        self._backoff_s = backoff_s
        self._ttl_s = ttl_s
        self._instances: dict[InstanceKey, Instance] = {}
        self._greetings: dict[int, tuple[Instance, Peer]] = {}
        self._changed: list[Instance] = []

    def linked(self) -> dict[Transport, int]:
        """Worker ranks that we are linked with."""
        peers = (peer for each in self._instances.values() for peer in each.peers.values())
        return Counter(peer.link for peer in peers if peer.link is not None)

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
            if instance.state is InstanceState.READY and not self._links.is_linked(instance):
                logger.warning("link with %s was lost; linking again", key.endpoint)
                self._rest(instance, "the link was lost", pause_s=0.0)
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
        linking = self._links.on_completion(completion)
        if linking is None or not linking.instance.is_meeting(linking.peer):
            return
        instance = linking.instance
        if completion.status in (_native.LLM_SUCCESS, _native.LLM_ALREADY_LINK):
            self._links.note(linking)
            self._settle(instance)
            return
        name = _native.status_name(completion.status)
        reason = f"link with {instance.key.endpoint}: {name}: {completion.error}"
        if completion.status in _LINK_AGAIN and time.monotonic() < instance.wanted_until:
            # A busy peer, or two that meet each other at once: the one that is refused soon finds the other's link.
            logger.debug("link with %s: %s: we try again", instance.key.endpoint, name)
            self._links.link_soon(linking)
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
        self._links.unlink(instance, force=True)
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
        self._rest(instance, reason, pause)

    def take_waiting(self, instance: Instance) -> list[str]:
        waiting, instance.waiting = instance.waiting, []
        return waiting

    def part(self) -> None:
        """For where a peer that does not hear of our end keeps its half of our links: it has so many and no more."""
        for instance in self._instances.values():
            self._links.unlink(instance, force=False)
        self._links.wait_until_gone()

    def leave_all(self, reason: str) -> None:
        """Unlinks from every instance; whoever asks for one next meets it anew."""
        for instance in self._instances.values():
            self._links.unlink(instance, force=True)
            # What is still heard of a meeting is of none.
            instance.state, instance.reason, instance.failed_step = InstanceState.BROKEN, reason, "link"
            self._changed.append(instance)
        self._instances.clear()

    def drop_unused(self, now: float) -> None:
        """Unlinks instances that nobody has asked for in a while, or that are gone: they would add up."""
        busy = self._busy()
        for key, instance in list(self._instances.items()):
            if instance in busy:
                instance.last_used = now
            elif instance.state is InstanceState.READY:
                idle_s = now - instance.last_used
                lost = not self._links.is_linked(instance)
                if lost or idle_s >= self._ttl_s:
                    logger.info(
                        "unlinked from %s: %s", key.endpoint, "it is gone" if lost else f"unused for {idle_s:.0f} s"
                    )
                    self._links.unlink(instance, force=lost)
                    del self._instances[key]

    def try_again(self, now: float) -> None:
        """Links, and meets instances, once more where that may succeed now and somebody waits for it."""
        busy = self._busy()
        self._links.try_again(now)
        for linking in self._links.take_due(now):
            if linking.instance.is_meeting(linking.peer):
                self._link(linking)
        for instance in list(self._instances.values()):
            if instance.state is not InstanceState.RESTING or instance.again_at > now:
                continue
            if instance not in busy:
                del self._instances[instance.key]
            elif not self._links.is_unlinking(instance):
                self._meet(instance)

    def next_wake(self) -> float | None:
        """When there is something to try again, or the next instance may be idle for too long."""
        at_once = self._links.next_wake()
        wakes = [at_once] if at_once is not None else []
        for instance in self._instances.values():
            if instance.state is InstanceState.READY:
                wakes.append(instance.last_used + self._ttl_s)
            elif instance.state is InstanceState.RESTING and not self._links.is_unlinking(instance):
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
        timeout_s = instance.within(self._handshake_timeout_s)
        sent = self._client.describe_rank(
            key.endpoint, key.engine_id, key.incarnation, rank.pp_rank, rank.tp_rank, timeout_s, self._ours.cluster_id
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
        instance = linking.instance
        if not self._links.is_room(sum(self.linked().values())):
            if self._links.are_unlinking() or self._drop_idlest():
                self._links.link_soon(linking)
            else:
                self.rest(
                    instance,
                    f"link with {instance.key.endpoint}: all of this rank's {self._links.most} links, as many as the"
                    " provider can have, are in use; more instances of D would share them",
                )
            return
        try:
            self._links.link(linking)
        except _native.QueueFullError:
            self._links.link_soon(linking)

    def _drop_idlest(self) -> bool:
        """Makes room for a link; False if every instance that we are linked with is in use."""
        busy = self._busy()
        idle = [each for each in self._instances.values() if each.state is InstanceState.READY and each not in busy]
        if not idle:
            return False
        idlest = min(idle, key=lambda each: each.last_used)
        logger.info("unlinked from %s: another is to be linked, and there are as many as can be", idlest.key.endpoint)
        self._links.unlink(idlest, force=False)
        del self._instances[idlest.key]
        return True

    def _rest(self, instance: Instance, reason: str, pause_s: float) -> None:
        self._links.unlink(instance, force=True)
        instance.state, instance.reason = InstanceState.RESTING, reason
        instance.again_at = time.monotonic() + pause_s

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
