"""ConsumerScheduler: every path of a D request, hostile params, and random sequences of vLLM's calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.pd import BLOCK_SIZE, LOOPBACK, OTHER_TOKEN, make_params, make_request, make_ticket

from vllm_datadist_connector.metadata import PullJob
from vllm_datadist_connector.protocol.digest import prompt_digest
from vllm_datadist_connector.protocol.params import EXTRA_KEY, LeaseTicket, parse_remote_prefill
from vllm_datadist_connector.scheduler import consumer as consumer_module
from vllm_datadist_connector.scheduler.consumer import ConsumerScheduler
from vllm_datadist_connector.side_channel.endpoint import Endpoint

PROMPT = list(range(100, 100 + 5 * BLOCK_SIZE - 3))
REMOTE = (11, 4, 9, 2, 30)
LOCAL = [50, 51, 52, 53, 54]


class Keeper:
    """Counts holds and releases in place of the thread that would tell P."""

    def __init__(self) -> None:
        self.users: Counter[str] = Counter()
        self.endpoints: list[Endpoint] = []
        self.gone: set[str] = set()
        self.full = False

    def hold(self, endpoint: Endpoint, ticket: LeaseTicket) -> bool:
        if self.full:
            return False
        self.endpoints.append(endpoint)
        self.users[ticket.token] += 1
        return True

    def holds(self, ticket: LeaseTicket) -> bool:
        return ticket.token not in self.gone

    def release(self, ticket: LeaseTicket) -> None:
        self.users[ticket.token] -= 1
        assert self.users[ticket.token] >= 0

    def close(self) -> None:
        pass


@pytest.fixture
def keeper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Keeper]:
    keeper = Keeper()
    monkeypatch.setattr(consumer_module, "LeaseKeeper", lambda _: keeper)
    yield keeper
    assert not +keeper.users, "a lease was not released"


@pytest.fixture
def consumer(keeper: Keeper) -> ConsumerScheduler:
    del keeper
    return ConsumerScheduler((BLOCK_SIZE,), lambda host: host == LOOPBACK, recv_deadline_s=60.0, answer_timeout_s=5.0)


def params_for(prompt: list[int], blocks: tuple[int, ...] = REMOTE, **changes: Any) -> dict[str, Any]:
    ticket = make_ticket(prompt_digest=prompt_digest(prompt))
    return make_params((blocks,), **({"ticket": ticket, "num_tokens": len(prompt)} | changes))


def d_request(params: dict[str, Any] | None = None, **more: Any) -> Any:
    return make_request(PROMPT, params if params is not None else params_for(PROMPT), **more)


def job_of(consumer: ConsumerScheduler) -> PullJob:
    (pulls, cancels) = consumer.take_jobs()
    assert cancels == ()
    (job,) = pulls
    return job


def test_pulled(consumer: ConsumerScheduler, keeper: Keeper) -> None:
    request = d_request()
    params = params_for(PROMPT)
    consumer.on_new_request(request)
    assert keeper.endpoints == [(LOOPBACK, 40000)]
    assert consumer.matched_tokens(request, 0) == consumer.matched_tokens(request, 0) == len(PROMPT)
    consumer.after_alloc(request, (LOCAL,), len(PROMPT))
    assert request.kv_transfer_params["do_remote_prefill"] is False
    assert job_of(consumer) == PullJob(
        request_id=request.request_id,
        remote=parse_remote_prefill(params),
        remote_blocks=(REMOTE,),
        local_blocks=(tuple(LOCAL),),
        prompt_digest=prompt_digest(PROMPT),
        deadline_s=60.0,
    )
    assert consumer.pulling() == 1
    assert consumer.matched_tokens(request, 0) == 0
    assert +keeper.users
    consumer.received([request.request_id])
    assert not +keeper.users
    # vLLM calls again when it schedules the loaded request.
    consumer.after_alloc(request, (LOCAL,), 0)
    consumer.request_finished(request.request_id)
    assert consumer.take_jobs() == ((), ())
    assert (consumer.pulling(), consumer.take_releases(), consumer.take_releases()) == (0, 1, 0)


@pytest.mark.parametrize("local_hit_blocks", [1, 3, 4])
def test_only_what_the_prefix_cache_lacks_is_pulled(consumer: ConsumerScheduler, local_hit_blocks: int) -> None:
    request = d_request()
    consumer.on_new_request(request)
    lacking = consumer.matched_tokens(request, local_hit_blocks * BLOCK_SIZE)
    assert lacking == len(PROMPT) - local_hit_blocks * BLOCK_SIZE
    consumer.after_alloc(request, (LOCAL,), lacking)
    job = job_of(consumer)
    assert job.remote_blocks == (REMOTE[local_hit_blocks:],)
    assert job.local_blocks == (tuple(LOCAL[local_hit_blocks:]),)
    consumer.received([request.request_id])


@pytest.mark.parametrize("computed", [len(PROMPT), len(PROMPT) + 1])
def test_nothing_lacks(consumer: ConsumerScheduler, computed: int) -> None:
    request = d_request()
    consumer.on_new_request(request)
    assert consumer.matched_tokens(request, computed) == 0
    consumer.after_alloc(request, (LOCAL,), 0)
    assert consumer.take_jobs() == ((), ())
    assert consumer.take_releases() == 1


def test_p_computed_less_than_the_prompt(consumer: ConsumerScheduler) -> None:
    request = d_request(params_for(PROMPT, REMOTE[:2], num_tokens=2 * BLOCK_SIZE))
    consumer.on_new_request(request)
    assert consumer.matched_tokens(request, BLOCK_SIZE) == BLOCK_SIZE
    consumer.after_alloc(request, (LOCAL,), BLOCK_SIZE)
    assert job_of(consumer).local_blocks == ((51,),)
    consumer.received([request.request_id])


@pytest.mark.parametrize("num_tokens", [10**6, len(PROMPT)])
def test_p_cannot_give_more_than_its_blocks_or_the_prompt(consumer: ConsumerScheduler, num_tokens: int) -> None:
    request = d_request(params_for(PROMPT, REMOTE[:3], num_tokens=num_tokens))
    consumer.on_new_request(request)
    assert consumer.matched_tokens(request, 0) == 3 * BLOCK_SIZE
    consumer.request_finished(request.request_id)


def test_aborted_before_it_was_scheduled(consumer: ConsumerScheduler, keeper: Keeper) -> None:
    request = d_request()
    consumer.on_new_request(request)
    consumer.matched_tokens(request, 0)
    consumer.request_finished(request.request_id)
    assert not +keeper.users
    assert consumer.take_jobs() == ((), ())


def test_aborted_while_it_is_pulled(consumer: ConsumerScheduler, keeper: Keeper) -> None:
    request = d_request()
    consumer.on_new_request(request)
    consumer.after_alloc(request, (LOCAL,), len(PROMPT))
    consumer.take_jobs()
    consumer.request_finished(request.request_id)
    assert consumer.take_jobs() == ((), (request.request_id,))
    assert +keeper.users, "P must keep the blocks until nothing reads them"
    consumer.received([request.request_id])
    assert not +keeper.users


def test_a_failed_pull_is_recomputed_here(consumer: ConsumerScheduler) -> None:
    request = d_request()
    consumer.on_new_request(request)
    consumer.after_alloc(request, (LOCAL,), len(PROMPT))
    consumer.take_jobs()
    consumer.received([request.request_id])
    assert consumer.matched_tokens(request, 0) == 0
    consumer.after_alloc(request, (LOCAL,), 0)
    assert consumer.take_jobs() == ((), ())


def test_a_lease_known_to_be_gone_is_not_pulled(consumer: ConsumerScheduler, keeper: Keeper) -> None:
    request = d_request()
    consumer.on_new_request(request)
    keeper.gone.add(request.kv_transfer_params[EXTRA_KEY]["token"])
    assert consumer.matched_tokens(request, 0) == 0
    consumer.after_alloc(request, (LOCAL,), 0)


def test_more_leases_than_can_be_kept(consumer: ConsumerScheduler, keeper: Keeper) -> None:
    keeper.full = True
    request = d_request()
    consumer.on_new_request(request)
    assert consumer.matched_tokens(request, 0) == 0


def test_children_that_share_a_lease(consumer: ConsumerScheduler, keeper: Keeper) -> None:
    children = [d_request(params_for(PROMPT), request_id=f"{i}_cmpl-x") for i in range(3)]
    for child in children:
        consumer.on_new_request(child)
        consumer.after_alloc(child, (LOCAL,), len(PROMPT))
    assert len(consumer.take_jobs()[0]) == 3
    consumer.received([child.request_id for child in children[:2]])
    assert +keeper.users
    consumer.received([children[2].request_id])


HOSTILE: dict[str, dict[str, Any]] = {
    "nothing but the flag": {"do_remote_prefill": True},
    "another connector's": {**make_params(ticket=None)},
    "another prompt's": params_for([*PROMPT, 1]),
    "forged digest": params_for(PROMPT, ticket=make_ticket(prompt_digest=OTHER_TOKEN)),
    "host": params_for(PROMPT, host="169.254.169.254"),
    "host name": params_for(PROMPT, host="localhost"),
    "two groups": make_params((REMOTE, REMOTE), ticket=make_ticket(prompt_digest=prompt_digest(PROMPT))),
    "null blocks": params_for(PROMPT) | {"remote_block_ids": None},
    "port": params_for(PROMPT) | {"remote_port": 0},
}


@pytest.mark.parametrize("params", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_params_are_prefilled_here(
    consumer: ConsumerScheduler, keeper: Keeper, params: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    request = d_request(dict(params))
    consumer.on_new_request(request)
    assert consumer.matched_tokens(request, 0) == 0
    consumer.after_alloc(request, (LOCAL,), 0)
    consumer.request_finished(request.request_id)
    assert not +keeper.users
    assert consumer.take_jobs() == ((), ())
    assert [request.request_id in record.message for record in caplog.records] == [True]


def test_embeddings_are_prefilled_here(consumer: ConsumerScheduler, keeper: Keeper) -> None:
    zeros = [0] * len(PROMPT)
    request = make_request(zeros, params_for(zeros), prompt_embeds=torch.zeros(len(PROMPT), 4))
    consumer.on_new_request(request)
    assert consumer.matched_tokens(request, 0) == 0
    consumer.after_alloc(request, (LOCAL,), 0)
    assert not +keeper.users


def test_rejected_by_the_api_server_gives_the_lease_back(
    consumer: ConsumerScheduler, keeper: Keeper, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM announces a rejected request with a prompt of its own making and aborts it at once."""
    request = make_request([0], params_for(PROMPT))
    consumer.on_new_request(request)
    assert +keeper.users
    consumer.request_finished(request.request_id)
    assert not +keeper.users
    assert consumer.take_jobs() == ((), ())
    assert not caplog.records


def test_ordinary_requests_are_none_of_ours(consumer: ConsumerScheduler, keeper: Keeper) -> None:
    request = make_request(PROMPT)
    consumer.on_new_request(request)
    assert consumer.matched_tokens(request, 0) == 0
    consumer.after_alloc(request, (LOCAL,), 0)
    consumer.received(["unknown"])
    consumer.request_finished(request.request_id)
    assert not keeper.users
    assert consumer.take_jobs() == ((), ())


CALLS = st.sampled_from(["new", "match", "alloc", "alloc nothing", "step", "received", "finished"])


@given(st.lists(st.tuples(CALLS, st.integers(0, 2)), max_size=40))
def test_any_sequence_of_calls(calls: list[tuple[str, int]]) -> None:
    """vLLM may call in any order about any request: no exception, and each lease is released exactly once."""
    with pytest.MonkeyPatch.context() as patch:
        keeper = Keeper()
        patch.setattr(consumer_module, "LeaseKeeper", lambda _: keeper)
        consumer = ConsumerScheduler((BLOCK_SIZE,), lambda _: True, recv_deadline_s=1.0, answer_timeout_s=1.0)
        requests = [d_request(params_for(PROMPT), request_id=str(i)) for i in range(3)]
        pulled: Counter[str] = Counter()

        def step() -> None:
            pulls, _ = consumer.take_jobs()
            pulled.update(job.request_id for job in pulls)

        for call, index in calls:
            request = requests[index]
            if call == "new":
                consumer.on_new_request(request)
            elif call == "match":
                assert 0 <= consumer.matched_tokens(request, BLOCK_SIZE) <= len(PROMPT) - BLOCK_SIZE
            elif call == "alloc":
                consumer.after_alloc(request, (LOCAL,), len(PROMPT))
            elif call == "alloc nothing":
                consumer.after_alloc(request, (LOCAL,), 0)
            elif call == "step":
                step()
            elif call == "received":
                consumer.received([request.request_id])
            else:
                consumer.request_finished(request.request_id)
        step()
        for request in requests:
            consumer.request_finished(request.request_id)
        consumer.received([request.request_id for request in requests])
        assert consumer.pulling() == 0
        assert not +keeper.users
        assert all(count == 1 for count in pulled.values())
        assert len(keeper.endpoints) == consumer.take_releases()
