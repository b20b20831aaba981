"""Calls: a planned transfer's native calls, or copies inside our own memory, given to whoever runs them."""

from __future__ import annotations

import time

from vllm_datadist_connector import _native
from vllm_datadist_connector.protocol.handshake import RankGeometry
from vllm_datadist_connector.worker.caches import RegisteredCaches
from vllm_datadist_connector.worker.copies import OwnCopies
from vllm_datadist_connector.worker.plan import BlockPull
from vllm_datadist_connector.worker.transfers import Transfer, TransferTable

_TENSORS_PER_LAYER = 1
"""Our caches count one tensor per layer; without a layer range the value has no other effect than to divide."""


class Calls:
    """Belongs to the driver thread."""

    def __init__(
        self, queue: _native.TransferQueue, copies: OwnCopies, caches: RegisteredCaches, transfers: TransferTable
    ) -> None:
        self._queue = queue
        self._copies = copies
        self._caches = caches
        self._transfers = transfers

    def submit(self, transfer: Transfer) -> bool:
        """As many of its unsubmitted ones as the queue has room for; False if that was not enough.

        Raises:
            EngineError: the engine refused a view of our memory.
        """
        try:
            while transfer.unsubmitted:
                theirs, pull = transfer.unsubmitted[0]
                call = self._submit(transfer, theirs, pull)
                self._transfers.add_call(transfer, call, theirs.cluster_id)
                transfer.unsubmitted.popleft()
        except _native.QueueFullError:
            return False
        return True

    def take_back(self, transfer: Transfer) -> None:
        """What has not started completes as cancelled, and no more of it is submitted."""
        transfer.unsubmitted.clear()
        for call in transfer.calls:
            if call < 0:
                self._copies.cancel(call)
            else:
                self._queue.cancel(call)

    def _submit(self, transfer: Transfer, theirs: RankGeometry, pull: BlockPull) -> int:
        if transfer.instance.is_ourselves:
            return self._copies.submit(pull, transfer.deadline)
        return self._queue.submit_pull_blocks(
            theirs.cluster_id,
            pull.src_cache_id,
            self._caches.view(pull.dst_index, pull.granule),
            pull.src_blocks,
            pull.dst_blocks,
            deadline_ms=max(1, int((transfer.deadline - time.monotonic()) * 1000)),
            src_layer_range=pull.src_layers,
            dst_layer_range=pull.dst_layers,
            tensor_num_per_layer=_TENSORS_PER_LAYER,
        )
