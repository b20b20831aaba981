"""Hand-offs as P's scheduler sees them: requests for which a D may wait while they are prefilled.

    request names a hand-off ──> promised ──first step──> begun ──request_finished──┬──> sealed (a lease of that name)
                                             │       ▲                              └──> ended (aborted, nothing held)
                                             └─steps─┘ new blocks; a larger epoch once it was preempted

What is computed is told twice: the block tables to D, through the table from which the side channel answers; the range
of each step's chunk to our own ranks, which report what of it is final.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_datadist_connector.kv_groups import KVGroup
from vllm_datadist_connector.metadata import Chunk, GivingStep
from vllm_datadist_connector.protocol.params import BlockIds, encode_prefill
from vllm_datadist_connector.side_channel.endpoint import Endpoint
from vllm_datadist_connector.side_channel.server import HandoffTable

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from vllm_datadist_connector.protocol.params import RemotePrefill

Describe = Callable[["Request", int, BlockIds], "RemotePrefill | None"]
"""(request, tokens that it will hold, its blocks so far) -> what D is told; None: not known yet."""


@dataclass(slots=True)
class _Given:
    request: Request
    token: str
    num_tokens: int
    """Tokens that the request will hold when its prefill is done."""
    epoch: int = 0
    computed: int = 0
    """Once the steps given out so far have ended."""
    tables: list[list[int]] = field(default_factory=list)


class Handoffs:
    """Belongs to the scheduler thread."""

    def __init__(
        self, table: HandoffTable, groups: Sequence[KVGroup], group_ids: Sequence[int], describe: Describe
    ) -> None:
        """
        Args:
            group_ids: which of vLLM's KV cache groups ours are.
        """
        self._table = table
        self._groups = groups
        self._group_ids = group_ids
        self._describe = describe
        self._given: dict[str, _Given] = {}
        self._untold: dict[str, _Given] = {}
        """Those whose tables D does not know, or not all of them."""
        self._sealed: dict[str, str] = {}

    @property
    def key(self) -> str:
        """Which only our own ranks have."""
        return self._table.key

    def promise(self, request: Request, token: str, num_tokens: int) -> bool:
        """False: another request has that name already, or there are too many; it is one without a hand-off."""
        if not self._table.promise(token, request.request_id):
            return False
        self._given[request.request_id] = _Given(request, token, num_tokens)
        return True

    def step(self, output: SchedulerOutput, endpoint: Endpoint) -> GivingStep | None:
        """What the step computes of requests with a hand-off."""
        if not self._given:
            return None
        chunks = []
        for new in output.scheduled_new_reqs:
            given = self._given.get(new.req_id)
            if given is not None:
                chunks.append(self._begin(given, new.block_ids, new.num_computed_tokens, output))
        cached = output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            given = self._given.get(request_id)
            if given is None:
                continue
            blocks, computed = cached.new_block_ids[index], cached.num_computed_tokens[index]
            if request_id in cached.resumed_req_ids:
                chunks.append(self._begin(given, blocks or (), computed, output))
            elif given.computed < given.num_tokens or computed < given.computed:
                chunks.append(self._go_on(given, blocks, computed, output))
        self._tell()
        return GivingStep(endpoint, self._table.key, tuple(chunks)) if chunks else None

    def token_of(self, request_id: str) -> str:
        """Of the hand-off of a request that is not sealed yet; empty: it has none."""
        given = self._given.get(request_id)
        return given.token if given is not None else ""

    def is_withdrawn(self, token: str) -> bool:
        """Whether its D has given it up."""
        return self._table.is_withdrawn(token)

    def is_awaited(self, token: str) -> bool:
        """Whether somebody has asked for it."""
        return self._table.is_awaited(token)

    def seal(self, request_id: str, remote: RemotePrefill) -> bool:
        """The lease stands; False if nobody wants it any more."""
        given = self._pop(request_id)
        self._sealed[request_id] = given.token
        try:
            return self._table.seal(given.token, max(1, given.epoch), encode_prefill(remote))
        except ValueError as error:
            self._table.end(given.token, f"its blocks cannot be told: {error}")
            return True

    def end(self, request_id: str, reason: str) -> None:
        if request_id in self._given:
            self._table.end(self._pop(request_id).token, reason)

    def forget(self, request_ids: Iterable[str]) -> None:
        """Their leases have ended."""
        tokens = [token for each in request_ids if (token := self._sealed.pop(each, "")) != ""]
        if tokens:
            self._table.forget(tokens)

    def _pop(self, request_id: str) -> _Given:
        self._untold.pop(request_id, None)
        return self._given.pop(request_id)

    def _begin(self, given: _Given, blocks: Sequence[Sequence[int]], computed: int, output: SchedulerOutput) -> Chunk:
        """A prefill from its start, the first or one more: nothing of it is final.

        Nor is what the prefix cache had: vLLM counts blocks as cached when they are allocated, and those of a request
        in the same step are written by that step.
        """
        given.epoch += 1
        given.tables = [list(blocks[group]) if group < len(blocks) else [] for group in self._group_ids]
        self._untold[given.request.request_id] = given
        return self._chunk(given, 0, computed, output)

    def _go_on(
        self, given: _Given, blocks: Sequence[Sequence[int]] | None, computed: int, output: SchedulerOutput
    ) -> Chunk:
        before = given.computed
        if computed < before:
            # Tokens that a load had failed to bring are computed again.
            given.epoch, before = given.epoch + 1, 0
            self._untold[given.request.request_id] = given
        if blocks is not None and any(blocks):
            for table, group in zip(given.tables, self._group_ids, strict=True):
                table.extend(blocks[group])
            self._untold[given.request.request_id] = given
        return self._chunk(given, before, computed, output)

    def _chunk(self, given: _Given, before: int, computed: int, output: SchedulerOutput) -> Chunk:
        scheduled = output.num_scheduled_tokens[given.request.request_id]
        given.computed = min(computed + scheduled, given.num_tokens)
        return Chunk(given.token, given.epoch, before, given.computed)

    def _tell(self) -> None:
        for request_id, given in list(self._untold.items()):
            tables = zip(self._groups, given.tables, strict=True)
            held = tuple(group.holding(table, given.num_tokens) for group, table in tables)
            remote = self._describe(given.request, given.num_tokens, held)
            if remote is None:
                continue
            del self._untold[request_id]
            try:
                self._table.begin(given.token, given.epoch, encode_prefill(remote))
            except ValueError as error:
                # No message has room for so many blocks. The request itself is none the worse.
                self.end(request_id, f"its blocks cannot be told: {error}")
