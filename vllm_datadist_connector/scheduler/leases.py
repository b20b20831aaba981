"""Leases: what a D is told of the promises in P's lease table."""

from __future__ import annotations

from vllm_datadist_connector.protocol.digest import digest_and_count
from vllm_datadist_connector.protocol.params import BlockIds, LeaseTicket
from vllm_datadist_connector.protocol.version import PROTOCOL_VERSION
from vllm_datadist_connector.side_channel.server import LeaseTable, ManualClock


class Leases:
    """Grants into `table`, from which the side channel answers."""

    def __init__(
        self,
        incarnation: str,
        block_sizes: tuple[int, ...],
        limit_s: float,
        claim_s: float = float("inf"),
        clock: ManualClock | None = None,
    ) -> None:
        """
        Args:
            claim_s: a lease that nobody has renewed yet lasts no longer.
        """
        self.table = LeaseTable(limit_s, clock)
        self._claim_s = claim_s
        self._incarnation = incarnation
        self._block_sizes = block_sizes

    def grant(
        self,
        request_id: str,
        blocks: BlockIds,
        prompt_digest: str,
        lease_s: float,
        adapter: str = "",
        is_renewed: bool = True,
        token: str = "",
    ) -> LeaseTicket:
        """Keeps a request's blocks until `lease_s` pass without a renewal.

        Args:
            token: the lease's name, of a hand-off; empty: one is made.
            is_renewed: somebody will come for it soon. Many answers carry their params to nobody (streams, the children
                of n > 1, lists of prompts, batches), and vLLM tells a connector of none of them.
        """
        blocks_digest, num_blocks = digest_and_count(blocks)
        claim_s = min(lease_s, self._claim_s) if is_renewed else lease_s
        token, generation = self.table.grant(
            request_id, prompt_digest, blocks_digest, num_blocks, claim_s, lease_s, token
        )
        return self.ticket(token, generation, prompt_digest, lease_s, adapter)

    def ticket(self, token: str, generation: int, prompt_digest: str, lease_s: float, adapter: str) -> LeaseTicket:
        """
        Args:
            generation: 0 of a lease that will be granted when the prefill is done.
        """
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
