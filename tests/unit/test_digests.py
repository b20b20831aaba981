"""PromptDigests: long prompts are read beside the scheduler thread, and read right."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from support.counting_keeper import CountingKeeper
from support.pd import BLOCK_SIZE, TO_P, decode, make_params, make_request, make_ticket, wait_until

from vllm_datadist_connector.kv_groups import KVGroup
from vllm_datadist_connector.protocol.digest import PromptHash, prompt_digest
from vllm_datadist_connector.scheduler import digests as digests_module
from vllm_datadist_connector.scheduler.consumer import ConsumerScheduler
from vllm_datadist_connector.scheduler.digests import INLINE_TOKENS, PromptDigests
from vllm_datadist_connector.side_channel.endpoint import Trust

LONG = list(range(INLINE_TOKENS + 5000))


class Gate:
    """Other threads hash once they are let; what the test's own hashes is counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.here = 0
        main, gate, original = threading.current_thread(), self, PromptHash.update

        def update(self: PromptHash, token_ids: list[int]) -> None:
            if threading.current_thread() is main:
                gate.here += len(token_ids)
            else:
                assert gate.open.wait(10.0)
            original(self, token_ids)

        monkeypatch.setattr(PromptHash, "update", update)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


@pytest.fixture
def digests() -> Iterator[PromptDigests]:
    digests = PromptDigests()
    yield digests
    digests.close()


@pytest.mark.parametrize("length", [1, INLINE_TOKENS, INLINE_TOKENS + 1, 3 * digests_module._PIECE, len(LONG)])
def test_as_at_once(digests: PromptDigests, length: int) -> None:
    request = make_request(LONG[:length], TO_P)
    digests.begin(request, length)
    wait_until(lambda: digests.is_ready(request.request_id), "the digest")
    assert digests.take(request, length, "") == prompt_digest(LONG[:length])


@pytest.mark.parametrize("shorter", [0, 1])
def test_what_came_after_the_prompt_is_added(digests: PromptDigests, shorter: int) -> None:
    request = make_request(LONG, TO_P)
    digests.begin(request, len(LONG) - shorter)
    wait_until(lambda: digests.is_ready(request.request_id), "the digest")
    output = [7] * 40
    decode(request, output)
    assert digests.take(request, len(LONG) + 39, "") == prompt_digest([*LONG, *output[:39]])


def test_fewer_than_were_begun_with(digests: PromptDigests) -> None:
    request = make_request(LONG, TO_P)
    digests.begin(request, len(LONG))
    wait_until(lambda: digests.is_ready(request.request_id), "the digest")
    assert digests.take(request, 10, "") == prompt_digest(LONG[:10])


def test_the_scheduler_thread_reads_little(digests: PromptDigests, gate: Gate) -> None:
    gate.open.set()
    request = make_request(LONG, TO_P)
    digests.begin(request, len(LONG))
    wait_until(lambda: digests.is_ready(request.request_id), "the digest")
    digests.take(request, len(LONG), "")
    assert gate.here == 0


def test_forgotten_ones_are_not_kept(digests: PromptDigests, gate: Gate) -> None:
    request = make_request(LONG, TO_P)
    digests.begin(request, len(LONG))
    digests.forget(request.request_id)
    gate.open.set()
    assert digests.is_ready(request.request_id)
    assert digests.take(request, 3, "") == prompt_digest(LONG[:3])
    assert not digests._works


@pytest.mark.parametrize("is_right", [True, False])
def test_a_request_waits_for_it(keeper: CountingKeeper, gate: Gate, is_right: bool) -> None:
    """vLLM asks again in the next step, and schedules others meanwhile."""
    del keeper
    consumer = ConsumerScheduler((KVGroup(BLOCK_SIZE),), lambda _: True, 60.0, 5.0, Trust(), None)
    gate.open.set()
    digest = prompt_digest(LONG if is_right else LONG[1:])
    gate.open.clear()
    gate.here = 0
    blocks = tuple(range(1, 2 + len(LONG) // BLOCK_SIZE))
    params = make_params((blocks,), ticket=make_ticket(prompt_digest=digest), num_tokens=len(LONG))
    request = make_request(LONG, params)
    consumer.on_new_request(request)
    assert consumer.matched_tokens(request, 0) is None
    gate.open.set()
    wait_until(lambda: consumer.matched_tokens(request, 0) is not None, "the comparison")
    assert consumer.matched_tokens(request, 0) == (len(LONG) - 1 if is_right else 0)
    assert gate.here == 0
    consumer.request_finished(request.request_id)
    consumer.close()
