"""Leases: what a D is told of the promises in P's lease table."""

from __future__ import annotations

from vllm_datadist_connector.protocol.digest import blocks_digest
from vllm_datadist_connector.protocol.params import BlockIds, LeaseTicket
from vllm_datadist_connector.protocol.version import PROTOCOL_VERSION
from vllm_datadist_connector.side_channel.server import LeaseTable, ManualClock


class Leases:
    """Grants into `table`, from which the side channel answers."""

    def __init__(
        self, incarnation: str, block_sizes: tuple[int, ...], limit_s: float, clock: ManualClock | None = None
    ) -> None:
        self.table = LeaseTable(limit_s, clock)
        self._incarnation = incarnation
        self._block_sizes = block_sizes

    def grant(
        self, request_id: str, blocks: BlockIds, prompt_digest: str, lease_s: float, adapter: str = ""
    ) -> LeaseTicket:
        """Keeps a request's blocks until `lease_s` pass without a renewal."""
        num_blocks = sum(sum(1 for block in group if block) for group in blocks)
        token, generation = self.table.grant(request_id, prompt_digest, blocks_digest(blocks), num_blocks, lease_s)
        return LeaseTicket(
            version=PROTOCOL_VERSION,
            incarnation=self._incarnation,
            token=token,
            generation=generation,
            lease_s=lease_s,
            prompt_digest=prompt_digest,
            adapter=adapter,
            block_sizes=self._block_sizes,
        )
