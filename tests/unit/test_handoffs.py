"""P's side of hand-offs: what each step computes of them, and what becomes of their names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest
from support.channels import wait_for
from support.pd import BLOCK_SIZE, LOOPBACK, OTHER_TOKEN, TO_P, TOKEN, WAIT_S, finish, make_request, wait_until
from support.steps import NO_STEP, first_step, next_step
from vllm.v1.request import Request, RequestStatus

from vllm_datadist_connector.kv_groups import KVGroup
from vllm_datadist_connector.metadata import Chunk
from vllm_datadist_connector.protocol.params import decode_prefill
from vllm_datadist_connector.scheduler.identity import InstanceIdentity
from vllm_datadist_connector.scheduler.producer import ProducerScheduler
from vllm_datadist_connector.side_channel.client import HandoffNews, open_client
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust

LEASE_S = 30.0
PROMPT = 100
GROUPS = (KVGroup(BLOCK_SIZE), KVGroup(0))
GROUP_IDS = (0, 2)
"""vLLM's second group stays here."""


@pytest.fixture
def producer() -> Iterator[ProducerScheduler]:
    identity = InstanceIdentity("engine-p", 1, 1, dcp_size=1, groups=GROUPS)
    with closing(
        ProducerScheduler(identity, Endpoint(LOOPBACK, 0), 600.0, Trust(), 10.0, GROUP_IDS, LEASE_S)
    ) as producer:
        yield producer


def promise(producer: ProducerScheduler, token: object = TOKEN, request_id: str = "r", prompt: int = PROMPT) -> Request:
    request = make_request(range(prompt), {**TO_P, "datadist": {"handoff": token}}, request_id)
    producer.on_new_request(request)
    return request


def tables(*blocks: int) -> tuple[Sequence[int], ...]:
    return blocks, (90,), (7,)


def chunks(producer: ProducerScheduler, output: Any) -> tuple[Chunk, ...]:
    giving = producer.step(output)
    assert giving is None or giving.endpoint == producer.endpoint
    return giving.chunks if giving is not None else ()


def look(producer: ProducerScheduler, token: str = TOKEN) -> HandoffNews:
    with closing(open_client(Trust())) as client:
        sent = client.await_handoff(producer.endpoint, token, None, 0, 0, 0.0, WAIT_S)
        news = wait_for(client, sent).response
    assert isinstance(news, HandoffNews)
    return news


def end(producer: ProducerScheduler, request: Request, *blocks: int) -> Any:
    return producer.request_finished(finish(request), (blocks, (7,)), LEASE_S)


def test_chunks_and_blocks_from_the_first_step_to_the_seal(producer: ProducerScheduler) -> None:
    request = promise(producer)
    assert look(producer).state == "promised"
    assert chunks(producer, NO_STEP) == ()
    assert chunks(producer, first_step("r", tables(3, 4), 0, 32)) == (Chunk(TOKEN, 1, 0, 32),)
    news = look(producer)
    assert (news.state, news.epoch) == ("begun", 1)
    told = decode_prefill(news.blob or b"", *producer.endpoint)
    assert (told.remote_block_ids, told.remote_num_tokens, told.ticket.generation) == (((3, 4), (7,)), PROMPT, 0)
    assert told.ticket.token == TOKEN
    assert chunks(producer, next_step("r", tables(5, 6), 32, 32)) == (Chunk(TOKEN, 1, 32, 64),)
    assert chunks(producer, next_step("r", None, 64, 36)) == (Chunk(TOKEN, 1, 64, 100),)
    # A step of decoding, which an asynchronous scheduler has begun already.
    assert chunks(producer, next_step("r", None, 100, 1)) == ()
    keep, params = end(producer, request, 3, 4, 5, 6, 8, 9, 10)
    assert keep
    assert params["datadist"]["token"] == TOKEN
    sealed = look(producer)
    assert (sealed.state, sealed.epoch) == ("sealed", 1)
    ticket = decode_prefill(sealed.blob or b"", *producer.endpoint).ticket
    assert ticket.generation == params["datadist"]["generation"] > 0


def test_what_the_prefix_cache_has_is_of_the_first_chunk(producer: ProducerScheduler) -> None:
    """Blocks count as cached when they are allocated: those of a request in the same step are written by that step."""
    promise(producer)
    assert chunks(producer, first_step("r", tables(3, 4, 5), 32, 16)) == (Chunk(TOKEN, 1, 0, 48),)


def test_a_resumed_request_begins_again(producer: ProducerScheduler) -> None:
    promise(producer)
    chunks(producer, first_step("r", tables(3, 4), 0, 32))
    assert chunks(producer, next_step("r", tables(13, 14), 0, 16, resumed=True)) == (Chunk(TOKEN, 2, 0, 16),)
    news = look(producer)
    assert news.epoch == 2
    assert decode_prefill(news.blob or b"", *producer.endpoint).remote_block_ids[0] == (13, 14)
    # As vLLM's second model runner has it: as if it were new.
    assert chunks(
        producer,
        first_step(
            "r",
            tables(
                23,
            ),
            0,
            16,
        ),
    ) == (Chunk(TOKEN, 3, 0, 16),)


def test_a_request_that_was_done_and_begins_again(producer: ProducerScheduler) -> None:
    """Preempted between the scheduling of its last chunk and its end."""
    request = promise(producer)
    chunks(producer, first_step("r", tables(*range(3, 10)), 0, PROMPT))
    assert chunks(producer, next_step("r", tables(*range(13, 20)), 0, PROMPT, resumed=True)) == (
        Chunk(TOKEN, 2, 0, PROMPT),
    )
    end(producer, request, *range(13, 20))
    assert look(producer).epoch == 2


def test_tokens_that_are_computed_again_are_void(producer: ProducerScheduler) -> None:
    """After a load that failed vLLM goes back, in the same blocks."""
    promise(producer)
    chunks(producer, first_step("r", tables(3, 4, 5), 0, 48))
    assert chunks(producer, next_step("r", None, 16, 32)) == (Chunk(TOKEN, 2, 0, 48),)


def test_an_end_without_blocks_is_told(producer: ProducerScheduler) -> None:
    request = promise(producer)
    chunks(producer, first_step("r", tables(3), 0, 16))
    keep, _ = producer.request_finished(finish(request, RequestStatus.FINISHED_ABORTED), ([], []), LEASE_S)
    assert not keep
    news = look(producer)
    assert (news.state, "FINISHED_ABORTED" in news.reason) == ("ended", True)
    assert producer._handoffs._given == {}


def test_nothing_is_kept_for_a_d_that_gave_up(producer: ProducerScheduler) -> None:
    request = promise(producer)
    chunks(producer, first_step("r", tables(*range(3, 10)), 0, PROMPT))
    with closing(open_client(Trust())) as client:
        wait_for(client, client.release(producer.endpoint, [TOKEN], WAIT_S))
    keep, params = end(producer, request, *range(3, 10))
    assert not keep
    assert "datadist" not in params
    assert producer.held() == (0, 0)
    assert look(producer).state == "ended"


def test_a_name_is_of_one_request(producer: ProducerScheduler) -> None:
    first, second = promise(producer), promise(producer, request_id="s")
    assert chunks(producer, first_step("s", tables(20), 0, 16)) == ()
    assert end(producer, second, 20, 21, 22, 23, 24, 25, 26)[1]["datadist"]["token"] != TOKEN
    assert end(producer, first, 3, 4, 5, 6, 7, 8, 9)[1]["datadist"]["token"] == TOKEN


@pytest.mark.parametrize("token", [None, 5, "", "x" * 32, TOKEN.upper(), TOKEN + "0", [TOKEN], "ä" * 32])
def test_what_is_no_name_is_an_ordinary_request(producer: ProducerScheduler, token: object) -> None:
    request = promise(producer, token)
    assert chunks(producer, first_step("r", tables(3), 0, 16)) == ()
    assert end(producer, request, 3, 4, 5, 6, 7, 8, 9)[0]


def test_a_lease_that_has_ended_leaves_its_name_known_for_a_while(producer: ProducerScheduler) -> None:
    request = promise(producer)
    end(producer, request, 3, 4, 5, 6, 7, 8, 9)
    with closing(open_client(Trust())) as client:
        wait_for(client, client.release(producer.endpoint, [TOKEN], WAIT_S))
    assert producer.take_ended() == ("r",)
    assert look(producer).state == "ended"
    assert producer._handoffs._sealed == {}
    assert look(producer, OTHER_TOKEN).state == "unknown"


def test_blocks_that_no_message_has_room_for_end_the_hand_off_alone(producer: ProducerScheduler) -> None:
    blocks = [2**31 + at for at in range(300_000)]
    request = promise(producer, prompt=len(blocks) * BLOCK_SIZE)
    chunks(producer, first_step("r", tables(*blocks), 0, 16))
    # The digest of a long prompt takes a moment, and every step asks for it.
    wait_until(lambda: chunks(producer, NO_STEP) == () and look(producer).state == "ended", "the end")
    assert "cannot be told" in look(producer).reason
    keep, params = end(producer, request, *blocks)
    assert keep
    assert params["datadist"]["token"] != TOKEN


def test_an_embedded_prompt_has_no_hand_off(producer: ProducerScheduler) -> None:
    request = make_request(range(PROMPT), {**TO_P, "datadist": {"handoff": TOKEN}}, "r")
    request.prompt_embeds = object()  # type: ignore[assignment]
    producer.on_new_request(request)
    assert look(producer).state == "ended"


def test_the_hand_off_that_a_d_takes_is_not_given_on(producer: ProducerScheduler) -> None:
    """Where a D keeps an answer's blocks for the next turn."""
    params = {"do_remote_prefill": True, "remote_host": LOOPBACK, "remote_port": 1, "datadist": {"handoff": TOKEN}}
    producer.on_new_request(make_request(range(PROMPT), params, "r"))
    assert look(producer).state == "unknown"
