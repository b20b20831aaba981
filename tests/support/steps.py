"""vLLM's SchedulerOutput of steps that compute chunks of prompts, one request each."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput

NO_STEP: Any = SimpleNamespace(
    total_num_scheduled_tokens=0,
    num_scheduled_tokens={},
    scheduled_new_reqs=[],
    scheduled_cached_reqs=CachedRequestData.make_empty(),
)
"""One in which nothing is computed."""


def first_step(request_id: str, blocks: Sequence[Sequence[int]], computed: int, scheduled: int) -> SchedulerOutput:
    """A request's first: `blocks` are its tables, `computed` tokens were in the prefix cache."""
    new = SimpleNamespace(req_id=request_id, block_ids=tuple(map(list, blocks)), num_computed_tokens=computed)
    return _output(request_id, scheduled, scheduled_new_reqs=[new])


def next_step(
    request_id: str,
    blocks: Sequence[Sequence[int]] | None,
    computed: int,
    scheduled: int,
    resumed: bool = False,
) -> SchedulerOutput:
    """A later one: `blocks` are the new ones or, of a request that is `resumed` after a preemption, all."""
    cached = CachedRequestData.make_empty()
    cached.req_ids = [request_id]
    cached.resumed_req_ids = {request_id} if resumed else set()
    cached.new_block_ids = [tuple(map(list, blocks)) if blocks is not None else None]
    cached.num_computed_tokens = [computed]
    return _output(request_id, scheduled, scheduled_cached_reqs=cached)


def _output(request_id: str, scheduled: int, **changes: Any) -> SchedulerOutput:
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens = {request_id: scheduled}
    output.total_num_scheduled_tokens = scheduled
    for name, value in changes.items():
        setattr(output, name, value)
    return output
