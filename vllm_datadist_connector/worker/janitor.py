"""Janitor: ends P's halves of links whose D is gone, where the provider leaves them until both sides have unlinked.

There are so many links to be had and no more, and each holds memory of the device.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable

from vllm_datadist_connector import _native
from vllm_datadist_connector.worker import endings

logger = logging.getLogger(__name__)

_TIMEOUT_MS = 1000
_QUEUED_MS = 600_000
_NO_LINK = frozenset({_native.LLM_SUCCESS, _native.LLM_NOT_YET_LINK})


class Janitor:
    """Belongs to vLLM's thread, and never blocks it but in close()."""

    def __init__(self, datadist: _native.LlmDataDist) -> None:
        self._queue = _native.TransferQueue(datadist, threads=1)

    def unlink(self, cluster_ids: Iterable[int]) -> None:
        """By force: nobody is there to be asked. Clusters that we have no link with are no error."""
        for completion in self._queue.poll():
            if completion.status not in _NO_LINK:
                name = _native.status_name(completion.status)
                logger.warning("unlinking from a D that is gone: %s: %s", name, completion.error)
        for cluster_id in cluster_ids:
            with contextlib.suppress(_native.QueueFullError):
                cluster = _native.ClusterInfo(remote_cluster_id=cluster_id)
                self._queue.submit_unlink(cluster, _TIMEOUT_MS, _QUEUED_MS, True)

    def close(self) -> bool:
        """False if a native call never came back: what it uses must stay."""
        return endings.end(self._queue, _TIMEOUT_MS / 1000)
