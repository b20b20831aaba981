"""Unlinkings: links that were given up, until it is proven that they are gone.

    begin() ──> unlink call ──done, or there was no link──> gone
                  ▲    │
                  └────┘ refused, late, or no room in the queue: again after a while, by force

What a failed call has left behind may be written for as long as its link is there, where a provider cannot end it
sooner. So neither are the blocks handed back before, nor is the same cluster linked with again.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque

from vllm_datadist_connector import _native

logger = logging.getLogger(__name__)

_TIMEOUT_MS = 1000
_QUEUED_MS = 60_000
"""An unlink call may wait so long for its turn behind pulls."""
_PAUSE_S = 0.5
_GONE = frozenset({_native.LLM_SUCCESS, _native.LLM_NOT_YET_LINK})


class Unlinkings:
    """Belongs to the driver thread."""

    def __init__(self, queue: _native.TransferQueue) -> None:
        self._queue = queue
        self._calls: dict[int, _native.ClusterInfo] = {}
        self._again: deque[tuple[float, _native.ClusterInfo]] = deque()
        self._pending: Counter[int] = Counter()
        self._gone: list[int] = []

    def begin(self, cluster: _native.ClusterInfo, force: bool) -> None:
        """
        Args:
            force: the peer is not asked: after a fault it may not answer.
        """
        self._pending[cluster.remote_cluster_id] += 1
        self._submit(cluster, force)

    def is_pending(self, cluster_id: int) -> bool:
        return cluster_id in self._pending

    def __len__(self) -> int:
        return len(self._pending)

    def on_completion(self, completion: _native.Completion) -> bool:
        """Takes the end of an unlink call; False if it is another's."""
        cluster = self._calls.pop(completion.id, None)
        if cluster is None:
            return False
        if completion.status not in _GONE:
            name = _native.status_name(completion.status)
            logger.warning("unlink from cluster %d: %s: %s", cluster.remote_cluster_id, name, completion.error)
            self._again.append((time.monotonic() + _PAUSE_S, cluster))
            return True
        cluster_id = cluster.remote_cluster_id
        self._pending[cluster_id] -= 1
        if not self._pending[cluster_id]:
            del self._pending[cluster_id]
            self._gone.append(cluster_id)
        return True

    def take_gone(self) -> list[int]:
        """Clusters with which no link is left, since the last call."""
        gone, self._gone = self._gone, []
        return gone

    def try_again(self, now: float) -> None:
        while self._again and self._again[0][0] <= now:
            self._submit(self._again.popleft()[1], force=True)

    def next_wake(self) -> float | None:
        return self._again[0][0] if self._again else None

    def _submit(self, cluster: _native.ClusterInfo, force: bool) -> None:
        try:
            call = self._queue.submit_unlink(cluster, _TIMEOUT_MS, _QUEUED_MS, force)
        except _native.QueueFullError:
            self._again.append((time.monotonic() + _PAUSE_S, cluster))
        else:
            self._calls[call] = cluster
