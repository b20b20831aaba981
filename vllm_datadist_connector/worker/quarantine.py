"""Quarantine: blocks of pulls that are over, into which a call that has failed, or does not end, may still write.

They are kept from vLLM until it has ended, and the links over which it failed are gone. Where that takes long, an
operator has to know: the KV cache is smaller by so much.
"""

from __future__ import annotations

import logging

from vllm_datadist_connector.log_filter import OthersWords
from vllm_datadist_connector.worker.transfers import TransferTable

logger = logging.getLogger(__name__)
logger.addFilter(OthersWords())

LONG_S = 60.0


class Quarantine:
    """Belongs to the driver thread, but for num_blocks."""

    def __init__(self, transfers: TransferTable) -> None:
        self._transfers = transfers
        self._since: dict[str, float] = {}
        self._told: set[str] = set()
        self.num_blocks = 0
        """As of the driver's last round."""

    def watch(self, now: float) -> None:
        kept = {transfer.job.request_id: transfer for transfer in self._transfers.quarantined()}
        self.num_blocks = sum(transfer.num_blocks for transfer in kept.values())
        self._since = {request_id: self._since.get(request_id, now) for request_id in kept}
        self._told &= kept.keys()
        for request_id, transfer in kept.items():
            if request_id not in self._told and now >= self._since[request_id] + LONG_S:
                self._told.add(request_id)
                logger.critical(
                    "%s: %d blocks are kept back: its pull from %s, or the link over which that failed, does not end,"
                    " and bytes may still arrive; restart this instance if that does not pass",
                    transfer.job,
                    transfer.num_blocks,
                    transfer.instance.key.endpoint,
                )

    def next_wake(self) -> float | None:
        """When there is something to tell."""
        untold = [since for request_id, since in self._since.items() if request_id not in self._told]
        return min(untold) + LONG_S if untold else None
