"""Params that a D does not use: the request is prefilled here, counted by the reason, and P's lease is given back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.counting_keeper import CountingKeeper
from support.d_requests import LOCAL, PROMPT, REMOTE, d_request, make_consumer, noted, params_for
from support.pd import BLOCK_SIZE, OTHER_TOKEN, make_params, make_request, make_ticket

from vllm_datadist_connector.metrics import SchedulerMeter
from vllm_datadist_connector.protocol.digest import prompt_digest
from vllm_datadist_connector.scheduler.consumer import ConsumerScheduler


@pytest.fixture
def meter() -> SchedulerMeter:
    return SchedulerMeter("engine-d")


@pytest.fixture
def consumer(keeper: CountingKeeper, meter: SchedulerMeter) -> ConsumerScheduler:
    del keeper
    return make_consumer(meter=meter)


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "nothing but the flag": ({"do_remote_prefill": True}, "params"),
    "another connector's": ({**make_params(ticket=None)}, "params"),
    "another release's": (params_for(PROMPT, ticket=make_ticket(version=1)), "version"),
    "a longer prompt's": (params_for([*PROMPT, 1]), "prompt"),
    "another prompt's": (params_for([*PROMPT[:-1], 1]), "prompt"),
    "not how it begins": (params_for(PROMPT[1 : 2 * BLOCK_SIZE]), "prompt"),
    "fewer tokens than the digest's": (params_for(PROMPT, num_tokens=BLOCK_SIZE), "prompt"),
    "forged digest": (params_for(PROMPT, ticket=make_ticket(prompt_digest=OTHER_TOKEN)), "prompt"),
    "an adapter's": (params_for(PROMPT, ticket=make_ticket(adapter="a@1")), "adapter"),
    "host": (params_for(PROMPT, host="169.254.169.254"), "peer"),
    "host name": (params_for(PROMPT, host="localhost"), "peer"),
    "two groups": (make_params((REMOTE, REMOTE), ticket=make_ticket(prompt_digest=prompt_digest(PROMPT))), "params"),
    "null blocks": (params_for(PROMPT) | {"remote_block_ids": None}, "params"),
    "port": (params_for(PROMPT) | {"remote_port": 0}, "params"),
}


@pytest.mark.parametrize(("params", "reason"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_params_are_prefilled_here(
    consumer: ConsumerScheduler,
    keeper: CountingKeeper,
    meter: SchedulerMeter,
    params: dict[str, Any],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    request = d_request(dict(params))
    consumer.on_new_request(request)
    assert consumer.matched_tokens(request, 0) == 0
    consumer.after_alloc(request, (LOCAL,), 0)
    consumer.request_finished(request.request_id)
    assert not +keeper.users
    assert consumer.take_jobs() == ((), ())
    assert [request.request_id in record.message for record in caplog.records] == [True]
    assert noted(meter) == {reason: 1}


def test_what_p_did_not_hold_is_no_fault(
    consumer: ConsumerScheduler, meter: SchedulerMeter, caplog: pytest.LogCaptureFixture
) -> None:
    consumer.on_new_request(d_request(make_params(((),), num_tokens=0, ticket=None)))
    assert noted(meter) == {"nothing_held": 1}
    assert not caplog.records


def test_embeddings_are_prefilled_here(consumer: ConsumerScheduler, keeper: CountingKeeper) -> None:
    zeros = [0] * len(PROMPT)
    request = make_request(zeros, params_for(zeros), prompt_embeds=torch.zeros(len(PROMPT), 4))
    consumer.on_new_request(request)
    assert consumer.matched_tokens(request, 0) == 0
    consumer.after_alloc(request, (LOCAL,), 0)
    assert not +keeper.users
