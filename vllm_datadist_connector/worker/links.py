"""Links: the link and unlink calls that a rank makes, and which links there are.

    link() ──> made ──> alive, as far as can be told ──> unlink() ──> gone (unlinking.py)
      ▲   │
      └───┘ busy: again after a moment

Belongs to the driver thread.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from vllm_datadist_connector import _native
from vllm_datadist_connector.labels import Transport
from vllm_datadist_connector.log_filter import OthersWords
from vllm_datadist_connector.protocol.handshake import RankGeometry
from vllm_datadist_connector.side_channel.endpoint import Endpoint
from vllm_datadist_connector.wakeup import wait_readable
from vllm_datadist_connector.worker.instances import Instance, Peer
from vllm_datadist_connector.worker.unlinking import Unlinkings

logger = logging.getLogger(__name__)
logger.addFilter(OthersWords())

_LINK_PAUSE_S = 0.02
"""Until the next try of a link that its other end is just making as well, or has not answered, or that found the queue
full."""
_QUEUED_MS = 60_000
"""A link call may wait so long for its turn behind pulls."""


_LAST_UNLINKS_S = 2.0
_LOST = frozenset({_native.LLM_FAILED, _native.LLM_TIMEOUT, _native.LLM_NOT_YET_LINK, _native.LLM_KV_CACHE_NOT_EXIST})
_REFUSED = frozenset({_native.LLM_PARAM_INVALID, _native.LLM_FEATURE_NOT_ENABLED})
"""Codes of calls that have done nothing."""


class Linking(NamedTuple):
    """A link that is being made."""

    instance: Instance
    peer: Peer
    geometry: RankGeometry


class Links:
    def __init__(
        self,
        ours: Endpoint,
        queue: _native.TransferQueue,
        report: Callable[[int], _native.LinkReport | None],
        timeout_s: float,
        capabilities: _native.Capabilities,
    ) -> None:
        """
        Args:
            ours: where this rank's provider listens; port 0: it does not.
            report: of the link with a cluster, where the provider tells.
        """
        self._ours = ours
        self._queue = queue
        self._report = report if capabilities.reports_links else None
        self._timeout_s = timeout_s
        self._capabilities = capabilities
        self._calls: dict[int, Linking] = {}
        self._again: deque[tuple[float, Linking]] = deque()
        """What to try again, and when; the earliest first."""
        self._unlinkings = Unlinkings(queue)

    def link(self, linking: Linking) -> None:
        """
        Raises:
            QueueFullError: there is no place for the call.
        """
        timeout_ms = max(
            1, int(linking.instance.within(self._timeout_s) * 1000), self._capabilities.min_link_timeout_ms
        )
        call = self._queue.submit_link(self._cluster(linking.geometry), timeout_ms, timeout_ms + _QUEUED_MS)
        self._calls[call] = linking

    def link_soon(self, linking: Linking) -> None:
        self._again.append((time.monotonic() + _LINK_PAUSE_S, linking))

    def take_due(self, now: float) -> Iterator[Linking]:
        """Those of link_soon() whose time has come."""
        while self._again and self._again[0][0] <= now:
            yield self._again.popleft()[1]

    def on_completion(self, completion: _native.Completion) -> Linking | None:
        """Takes the end of a link or unlink call; of a link call returns what it was to link."""
        if self._unlinkings.on_completion(completion):
            return None
        return self._calls.pop(completion.id, None)

    def unlink(self, instance: Instance, force: bool) -> None:
        """Also what is just being linked. Nothing is linked with the same ranks again before these links are gone.

        Args:
            force: the peer is not asked, which may not answer; otherwise its half goes, too.
        """
        linking = {id(each.peer) for each in self._calls.values()}
        for peer, geometry in instance.givers:
            if peer.link is not None or id(peer) in linking:
                self._unlinkings.begin(self._cluster(geometry), force)
            peer.link = None

    def unlink_cluster(self, cluster_id: int) -> None:
        """Whoever made the link; the peer is not asked."""
        if not self._unlinkings.is_pending(cluster_id):
            self._unlinkings.begin(_native.ClusterInfo(remote_cluster_id=cluster_id), force=True)

    def is_linked(self, instance: Instance) -> bool:
        """With every rank that gives us something, as far as can be told."""
        if instance.is_ourselves:
            return True
        if self._report is None:
            return all(peer.link is not None for peer, _ in instance.givers)
        reports = [self._report(geometry.cluster_id) for _, geometry in instance.givers]
        return all(report is not None and report.alive for report in reports)

    def is_unlinking(self, instance: Instance) -> bool:
        return any(self._unlinkings.is_pending(geometry.cluster_id) for _, geometry in instance.givers)

    @property
    def most(self) -> int:
        """Links that there can be at a time; 0: any number."""
        return self._capabilities.max_links

    def is_room(self, linked: int) -> bool:
        """For one more than those, and than those that are being made or given up."""
        return not self.most or linked + len(self._calls) + len(self._unlinkings) < self.most

    def is_fault(self, status: int) -> bool:
        """Whether after a pull that ended so the link must be made anew before anything else is pulled over it."""
        # What goes on writing after a call that failed can only be ended with its link.
        return status in _LOST if self._capabilities.writes_end_with_call else status not in _REFUSED

    def are_unlinking(self) -> bool:
        return bool(self._unlinkings)

    def wait_until_gone(self) -> None:
        """At the very end: completions of other calls are nobody's any more."""
        until = time.monotonic() + _LAST_UNLINKS_S
        while self._unlinkings and time.monotonic() < until:
            wait_readable([self._queue.fileno()], until)
            for completion in self._queue.poll():
                self._unlinkings.on_completion(completion)

    def take_gone(self) -> list[int]:
        """Clusters with which no link is left, since the last call."""
        return self._unlinkings.take_gone()

    def try_again(self, now: float) -> None:
        self._unlinkings.try_again(now)

    def next_wake(self) -> float | None:
        wakes = [self._unlinkings.next_wake(), self._again[0][0] if self._again else None]
        return min((at for at in wakes if at is not None), default=None)

    def note(self, linking: Linking) -> None:
        """A link that was made."""
        peer, endpoint = linking.peer, linking.instance.key.endpoint
        report = self._report(linking.geometry.cluster_id) if self._report is not None else None
        peer.link = Transport(report.transport if report is not None else None)
        how = f" by {report.transport}" if report is not None else ""
        why = f" ({report.transport_reason})" if report is not None and report.transport_reason else ""
        milliseconds = (time.monotonic() - linking.instance.met_at) * 1000
        rank = f"rank (pp {peer.rank.pp_rank}, tp {peer.rank.tp_rank}) of {endpoint}"
        logger.info("linked with %s%s%s in %.0f ms", rank, how, why, milliseconds)

    def _cluster(self, geometry: RankGeometry) -> _native.ClusterInfo:
        return _native.ClusterInfo(
            remote_cluster_id=geometry.cluster_id,
            remote_ip_infos=[(geometry.host, geometry.port)],
            local_ip_infos=[(self._ours.host, self._ours.port)],
        )
