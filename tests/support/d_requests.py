"""Requests of a D for a prompt that P has prefilled, and the scheduler side that takes them."""

from __future__ import annotations

from typing import Any

from support.pd import BLOCK_SIZE, LOOPBACK, make_params, make_request, make_ticket
from vllm_datadist_connector.kv_groups import KVGroup
from vllm_datadist_connector.metrics import SchedulerMeter
from vllm_datadist_connector.protocol.digest import prompt_digest
from vllm_datadist_connector.scheduler.consumer import ConsumerScheduler
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust

PROMPT = list(range(100, 100 + 5 * BLOCK_SIZE - 3))
REMOTE = (11, 4, 9, 2, 30)
LOCAL = [50, 51, 52, 53, 54]
LOADED = len(PROMPT) - 1
"""All but the last token, which vLLM feeds in any case."""


def make_consumer(
    meter: SchedulerMeter | None = None, handoff_wait_s: float = 30.0, ourselves: tuple[Endpoint, str] | None = None
) -> ConsumerScheduler:
    return ConsumerScheduler(
        (KVGroup(BLOCK_SIZE),),
        allows_peer=lambda host: host == LOOPBACK,
        recv_deadline_s=60.0,
        answer_timeout_s=5.0,
        trust=Trust(),
        recompute_threshold=None,
        ourselves=ourselves,
        meter=meter,
        handoff_wait_s=handoff_wait_s,
    )


def counted(meter: SchedulerMeter) -> dict[str, int]:
    """Since the last call."""
    stats = meter.take()
    return stats.data["counts"] if stats is not None else {}


def noted(meter: SchedulerMeter) -> dict[str, int]:
    """Local prefills by reason, since the last call."""
    prefix = "local_prefills:"
    return {key.removeprefix(prefix): count for key, count in counted(meter).items() if key.startswith(prefix)}


def params_for(prompt: list[int], blocks: tuple[int, ...] = REMOTE, **changes: Any) -> dict[str, Any]:
    ticket = make_ticket(prompt_digest=prompt_digest(prompt))
    return make_params((blocks,), **({"ticket": ticket, "num_tokens": len(prompt)} | changes))


def d_request(params: dict[str, Any] | None = None, **more: Any) -> Any:
    return make_request(PROMPT, params if params is not None else params_for(PROMPT), **more)
