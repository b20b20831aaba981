"""D's side of hand-offs: a request waits, without blocks, for what P has begun, and no longer than that can come."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
from support.d_requests import LOCAL, PROMPT, REMOTE, make_consumer, noted
from support.pd import BLOCK_SIZE, LOOPBACK, TO_P, TOKEN, finish, make_request, wait_until
from support.steps import first_step
from vllm.v1.request import Request

from vllm_datadist_connector.kv_groups import KVGroup
from vllm_datadist_connector.metadata import PullJob
from vllm_datadist_connector.metrics import SchedulerMeter
from vllm_datadist_connector.scheduler import expected
from vllm_datadist_connector.scheduler.identity import InstanceIdentity
from vllm_datadist_connector.scheduler.producer import ProducerScheduler
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust

LONG_S = 3600.0


@pytest.fixture
def producer() -> Iterator[ProducerScheduler]:
    identity = InstanceIdentity("engine-p", 1, 1, dcp_size=1, groups=(KVGroup(BLOCK_SIZE),))
    with closing(ProducerScheduler(identity, Endpoint(LOOPBACK, 0), 600.0, Trust())) as producer:
        yield producer


def unused_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as server:
        return int(server.getsockname()[1])


class D:
    def __init__(self, wait_s: float) -> None:
        self.meter = SchedulerMeter("engine-d")
        self.scheduler = make_consumer(meter=self.meter, handoff_wait_s=wait_s)

    def matched(self, request: Request) -> int:
        """What vLLM is told in the end."""
        counts: list[int | None] = []

        def is_known() -> bool:
            counts.append(self.scheduler.matched_tokens(request, 0))
            return counts[-1] is not None

        wait_until(is_known, "an answer")
        assert counts[-1] is not None
        return counts[-1]

    def notes(self) -> dict[str, int]:
        return noted(self.meter)


@pytest.fixture
def make_d(resources: ExitStack) -> Callable[..., D]:
    def make(wait_s: float = LONG_S) -> D:
        d = D(wait_s)
        resources.callback(d.scheduler.close)
        return d

    return make


@pytest.fixture
def d(make_d: Callable[..., D]) -> D:
    return make_d()


def to_p(producer: ProducerScheduler, prompt: list[int] = PROMPT) -> Request:
    request = make_request(prompt, {**TO_P, "datadist": {"handoff": TOKEN}}, "p")
    producer.on_new_request(request)
    return request


def to_d(endpoint: Endpoint, request_id: str = "d", **changes: Any) -> Request:
    params = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_host": endpoint.host,
        "remote_port": endpoint.port,
        "datadist": {"handoff": TOKEN},
    }
    return make_request(PROMPT, params | changes, request_id)


def begin(producer: ProducerScheduler) -> None:
    producer.step(first_step("p", (REMOTE[:1],), 0, BLOCK_SIZE))


def test_d_waits_without_blocks_until_p_has_begun(producer: ProducerScheduler, d: D) -> None:
    request = to_d(producer.endpoint)
    d.scheduler.on_new_request(request)
    assert [d.scheduler.matched_tokens(request, 0) for _ in range(3)] == [None] * 3
    to_p(producer)
    assert d.scheduler.matched_tokens(request, 0) is None
    begin(producer)
    assert d.matched(request) == len(PROMPT) - 1
    d.scheduler.after_alloc(request, (LOCAL,), len(PROMPT) - 1)
    ((job,), _) = d.scheduler.take_jobs()
    assert isinstance(job, PullJob)
    assert (job.is_handoff, job.first_token, job.end_token) == (True, 0, len(PROMPT) - 1)
    assert (job.remote.ticket.token, job.remote.remote_num_tokens) == (TOKEN, len(PROMPT))
    assert job.local_blocks == (tuple(LOCAL),)
    assert d.notes() == {}


def test_a_finished_prefill_is_pulled_as_ever(producer: ProducerScheduler, d: D) -> None:
    producer.request_finished(finish(to_p(producer)), (list(REMOTE),), 30.0)
    request = to_d(producer.endpoint)
    d.scheduler.on_new_request(request)
    assert d.matched(request) == len(PROMPT) - 1
    d.scheduler.after_alloc(request, (LOCAL,), len(PROMPT) - 1)
    ((job,), _) = d.scheduler.take_jobs()
    assert (job.is_handoff, job.remote.remote_block_ids) == (False, (REMOTE,))


def test_an_instance_that_is_both_waits_for_the_end(producer: ProducerScheduler, make_d: Callable[..., D]) -> None:
    """Its blocks are what some P waits for: held for a prefill that waits for blocks, they could wait for ever."""
    d = make_d()
    request, of_p = to_d(producer.endpoint), to_p(producer)
    d.scheduler.on_new_request(request, gives=True)
    begin(producer)
    wait_until(lambda: d.scheduler._expected._requests["d"].known_until > 0, "the first question")
    assert [d.scheduler.matched_tokens(request, 0) for _ in range(50)] == [None] * 50
    producer.request_finished(finish(of_p), (list(REMOTE),), 30.0)
    assert d.matched(request) == len(PROMPT) - 1
    d.scheduler.after_alloc(request, (LOCAL,), len(PROMPT) - 1)
    assert not d.scheduler.take_jobs()[0][0].is_handoff


def test_a_p_that_never_hears_of_it(producer: ProducerScheduler, make_d: Callable[..., D]) -> None:
    d = make_d(wait_s=0.3)
    request = to_d(producer.endpoint)
    d.scheduler.on_new_request(request)
    assert d.matched(request) == 0
    assert d.notes() == {"no_prefill": 1}
    d.scheduler.after_alloc(request, (), 0)
    assert "d" not in d.scheduler._expected


def test_a_p_that_has_it_in_its_queue_is_waited_for(producer: ProducerScheduler, make_d: Callable[..., D]) -> None:
    d = make_d(wait_s=0.2)
    request = to_d(producer.endpoint)
    to_p(producer)
    d.scheduler.on_new_request(request)
    asked = []
    waiting = d.scheduler._expected._requests["d"]

    def is_asked_again() -> bool:
        assert d.scheduler.matched_tokens(request, 0) is None
        if waiting.question not in asked:
            asked.append(waiting.question)
        return len(asked) == 5

    wait_until(is_asked_again, "questions beyond its patience")
    begin(producer)
    assert d.matched(request) == len(PROMPT) - 1


def test_a_prefill_that_p_ends(producer: ProducerScheduler, d: D) -> None:
    request, of_p = to_d(producer.endpoint), to_p(producer)
    d.scheduler.on_new_request(request)
    producer.set_paused(True)
    producer.request_finished(finish(of_p), (list(REMOTE),), 30.0)
    assert d.matched(request) == 0
    assert d.notes() == {"no_prefill": 1}


def test_nobody_is_there(d: D) -> None:
    request = to_d(Endpoint(LOOPBACK, unused_port()))
    d.scheduler.on_new_request(request)
    assert d.matched(request) == 0
    assert d.notes() == {"no_prefill": 1}


def test_a_request_that_ends_while_it_waits(producer: ProducerScheduler, d: D) -> None:
    """P keeps nothing for it."""
    request, of_p = to_d(producer.endpoint), to_p(producer)
    d.scheduler.on_new_request(request)
    d.scheduler.request_finished("d")
    assert "d" not in d.scheduler._expected
    wait_until(lambda: producer._handoffs.is_withdrawn(TOKEN), "the news")
    assert producer.request_finished(finish(of_p), (list(REMOTE),), 30.0)[0] is False


def test_another_prompt_than_ps(producer: ProducerScheduler, d: D) -> None:
    to_p(producer, [1, *PROMPT[1:]])
    begin(producer)
    request = to_d(producer.endpoint)
    d.scheduler.on_new_request(request)
    assert d.matched(request) == 0
    d.scheduler.after_alloc(request, (), 0)
    assert d.notes() == {"prompt": 1}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"datadist": {"handoff": 7}}, "params"),
        ({"datadist": {"handoff": TOKEN.upper()}}, "params"),
        ({"datadist": {"handoff": None}}, "params"),
        ({"remote_host": None}, "params"),
        ({"remote_host": "x" * 10_000}, "params"),
        ({"remote_port": 0}, "params"),
        ({"remote_port": 2**40}, "params"),
        ({"remote_port": "80; ls"}, "params"),
        ({"remote_host": "192.0.2.1"}, "peer"),
        ({"remote_host": "localhost"}, "peer"),
    ],
)
def test_params_that_name_no_hand_off(d: D, changes: dict[str, Any], reason: str) -> None:
    request = to_d(Endpoint(LOOPBACK, 1), **changes)
    d.scheduler.on_new_request(request)
    assert d.matched(request) == 0
    assert d.notes() == {reason: 1}


def test_no_more_wait_than_p_keeps_questions_of(d: D, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expected, "MAX_WAITING", 2)
    endpoint = Endpoint(LOOPBACK, unused_port())
    for number in range(3):
        d.scheduler.on_new_request(to_d(endpoint, f"d{number}"))
    assert d.notes() == {"too_many": 1}


@pytest.mark.parametrize("blob", [b"", b"\xc1", b"\x90", b"\x81\xa1x\x01"])
def test_a_p_that_says_nonsense(producer: ProducerScheduler, d: D, blob: bytes) -> None:
    to_p(producer)
    producer._handoffs._table.begin(TOKEN, 1, blob)
    request = to_d(producer.endpoint)
    d.scheduler.on_new_request(request)
    assert d.matched(request) == 0
    assert d.notes() == {"no_prefill": 1}
