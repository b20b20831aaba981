"""Steps of a hand-off between a P process and a D rank: what tests of either mover are told in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from support.channels import wait_for
from support.consumer import Consumer
from support.giver_process import GiverProcess
from support.kv_ranks import LAYERS
from support.pd import BLOCK_SIZE, TOKEN, WAIT_S, wait_until
from vllm_datadist_connector.metadata import PullJob
from vllm_datadist_connector.protocol.params import RemotePrefill, decode_prefill
from vllm_datadist_connector.side_channel.client import HandoffNews, open_client
from vllm_datadist_connector.side_channel.endpoint import Trust
from vllm_datadist_connector.worker.transfers import Transfer

BLOCKS = [5, 63, 511, 17]
LOCAL = [9, 2, 60, 3]
TOKENS = len(BLOCKS) * BLOCK_SIZE
HALF = TOKENS // 2

StartGiver = Callable[..., GiverProcess]
StartTaker = Callable[..., Consumer]


def begun(giver: GiverProcess, token: str = TOKEN) -> RemotePrefill:
    """What D's scheduler knows once P has begun."""
    with closing(open_client(Trust())) as client:
        sent = client.await_handoff(giver.endpoint, token, None, 0, 0, 1.0, WAIT_S)
        news = wait_for(client, sent).response
    assert isinstance(news, HandoffNews)
    assert (news.state, news.blob is not None) == ("begun", True)
    return decode_prefill(news.blob or b"", *giver.endpoint)


def follow(
    consumer: Consumer,
    remote: RemotePrefill,
    local: Sequence[int] = LOCAL,
    request_id: str = "r",
    first_token: int = 0,
    deadline_s: float = WAIT_S,
) -> None:
    job = PullJob(
        request_id,
        remote,
        (tuple(local),),
        first_token,
        remote.remote_num_tokens,
        remote.ticket.prompt_digest,
        from_ourselves=False,
        deadline_s=deadline_s,
        is_handoff=True,
        is_pushed=consumer.offers,
    )
    consumer.driver.submit(job)


def wait_early(consumer: Consumer, num_bytes: int) -> None:
    """Until the transfer under way has so many bytes of a prefill that goes on, and nothing more is under way."""

    def early(transfer: Transfer) -> int:
        return transfer.early_bytes + sum(each.pushed_early_bytes for each in transfer.followed)

    def arrived() -> bool:
        transfers = list(consumer.driver._transfers._by_request.values())
        return any(early(each) == num_bytes and not each.calls for each in transfers)

    wait_until(arrived, f"{num_bytes} bytes of a prefill that goes on")


def bytes_of(consumer: Consumer, blocks: int, layers: int = LAYERS) -> int:
    return blocks * layers * int(consumer.memory[0, 0].nbytes)


def begin(giver: GiverProcess, scheduled: int = HALF) -> RemotePrefill:
    giver.promise("r", TOKEN, TOKENS)
    giver.step("r", BLOCKS[: -(-scheduled // BLOCK_SIZE)], 0, scheduled, "first")
    return begun(giver)


def pull_first_half(giver: GiverProcess, consumer: Consumer, **more: Any) -> None:
    """Returns when it is here and the second half has not begun."""
    follow(consumer, begin(giver), **more)
    giver.write(BLOCKS[:2])
    giver.end()
    wait_early(consumer, bytes_of(consumer, 2))


def finish(giver: GiverProcess) -> None:
    """The second half, from its step to the end of the request."""
    giver.step("r", BLOCKS[2:], HALF, TOKENS - HALF)
    giver.write(BLOCKS[2:])
    giver.end()
    giver.finish("r", BLOCKS)


def check(giver: GiverProcess, consumer: Consumer, local: Sequence[int] = LOCAL) -> None:
    consumer.wait(1)
    assert consumer.failed == set(), consumer.observer.failures
    consumer.expect(giver.kv, held_in(BLOCKS), local)
    consumer.check_bytes()


def check_mover(consumer: Consumer) -> None:
    """All was moved by whom it was to be moved by."""
    (transfer,) = consumer.observer.pulls
    assert transfer.pushed_bytes == (transfer.num_bytes if consumer.offers else 0)


def held_in(blocks: Sequence[int]) -> Any:
    class Held:
        remote_block_ids = (tuple(blocks),)

    return Held
