"""Hand-offs: a D rank gets what a P computes while it computes it, byte for byte, and every event on the way.

Whatever is not said otherwise happens to both movers: D that pulls, and P that pushes into blocks that D has offered.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import pytest
from support.channels import wait_for
from support.consumer import Consumer
from support.giver_process import GiverProcess
from support.handoffs import (
    BLOCKS,
    HALF,
    LOCAL,
    TOKENS,
    StartGiver,
    StartTaker,
    begin,
    begun,
    bytes_of,
    check,
    check_mover,
    finish,
    follow,
    held_in,
    pull_first_half,
    wait_early,
)
from support.kv_ranks import LAYERS, Place
from support.pd import BLOCK_SIZE, OTHER_TOKEN, TOKEN, WAIT_S, wait_until

from vllm_datadist_connector import _native
from vllm_datadist_connector.labels import Failure
from vllm_datadist_connector.side_channel.client import HandoffNews, open_client
from vllm_datadist_connector.side_channel.endpoint import Trust

P_CLUSTER = 100
DEADLINE_S = 4.0
"""Within which a chunk comes, however busy the machine is."""


@pytest.fixture
def ask(giver: GiverProcess) -> Iterator[Callable[..., HandoffNews]]:
    """What the side channel tells of a hand-off that differs from what was seen."""
    with closing(open_client(Trust())) as client:

        def about(token: str = TOKEN, rank: tuple[int, int] | None = None, version: int = 0) -> HandoffNews:
            answer = wait_for(client, client.await_handoff(giver.endpoint, token, rank, version, 0, 1.0, WAIT_S))
            assert isinstance(answer.response, HandoffNews), answer.error
            return answer.response

        yield about


@pytest.mark.parametrize("transport", ["cma", "tcp"])
def test_layers_and_chunks_come_as_they_are_written(
    start_giver: StartGiver, start_taker: StartTaker, transport: str
) -> None:
    giver, consumer = start_giver(transport=transport), start_taker(transport=transport)
    follow(consumer, begin(giver))
    for layer in range(LAYERS):
        giver.write(BLOCKS[:2], [layer])
        wait_early(consumer, bytes_of(consumer, 2, layer + 1))
    giver.end()
    giver.step("r", BLOCKS[2:], HALF, TOKENS - HALF)
    giver.write(BLOCKS[2:], [0])
    wait_early(consumer, bytes_of(consumer, 2) + bytes_of(consumer, 2, 1))
    giver.write(BLOCKS[2:], range(1, LAYERS))
    giver.end()
    giver.finish("r", BLOCKS)
    check(giver, consumer)
    (transfer,) = consumer.observer.pulls
    assert transfer.num_bytes == bytes_of(consumer, 4)
    check_mover(consumer)


def test_without_hooks_the_end_of_a_step_tells(start_giver: StartGiver, start_taker: StartTaker) -> None:
    giver, consumer = start_giver(announces_layers=False), start_taker()
    pull_first_half(giver, consumer)
    finish(giver)
    check(giver, consumer)


def test_half_a_block_waits_for_its_other_half(giver: GiverProcess, taker: Consumer) -> None:
    follow(taker, begin(giver, BLOCK_SIZE + BLOCK_SIZE // 2))
    giver.write(BLOCKS[:1])
    giver.end()
    wait_early(taker, bytes_of(taker, 1))
    giver.step("r", BLOCKS[2:], BLOCK_SIZE + BLOCK_SIZE // 2, TOKENS - BLOCK_SIZE - BLOCK_SIZE // 2)
    giver.write(BLOCKS[1:])
    giver.end()
    giver.finish("r", BLOCKS)
    check(giver, taker)


def test_d_that_comes_after_the_prefill_pulls_all_at_once(giver: GiverProcess, taker: Consumer) -> None:
    remote = begin(giver)
    giver.write(BLOCKS[:2])
    giver.end()
    finish(giver)
    follow(taker, remote)
    check(giver, taker)
    assert taker.observer.pulls[0].early_bytes == 0


def test_what_d_has_itself_is_not_moved(giver: GiverProcess, taker: Consumer) -> None:
    follow(taker, begin(giver), LOCAL[1:], first_token=BLOCK_SIZE)
    giver.write(BLOCKS[:2])
    giver.end()
    wait_early(taker, bytes_of(taker, 1))
    finish(giver)
    taker.wait(1)
    taker.expect(giver.kv, held_in(BLOCKS), LOCAL[1:], first_token=BLOCK_SIZE)
    taker.check_bytes()
    assert taker.failed == set()


@pytest.mark.parametrize(("p", "d"), [((2, 1, 16), (1, 1, 16)), ((1, 2, 16), (1, 1, 8)), ((1, 1, 8), (1, 1, 16))])
def test_unequal_sides(start_giver: StartGiver, start_taker: StartTaker, p: Sequence[int], d: Sequence[int]) -> None:
    giver = start_giver(tp_size=p[0], pp_size=p[1], block_size=p[2])
    consumer = start_taker(place=Place(0, 0, d[0], d[1], d[2]))
    blocks = [7 + 3 * at for at in range(TOKENS // p[2])]
    local = [5 + 2 * at for at in range(TOKENS // d[2])]
    half = len(blocks) // 2
    giver.promise("r", TOKEN, TOKENS)
    giver.step("r", blocks[:half], 0, HALF, "first")
    follow(consumer, begun(giver), local)
    giver.write(blocks[:half])
    giver.end()
    wait_early(consumer, int(consumer.memory[:, 0].nbytes) * len(local) // 2)
    giver.step("r", blocks[half:], HALF, HALF)
    giver.write(blocks[half:])
    giver.end()
    giver.finish("r", blocks)
    consumer.wait(1)
    assert consumer.failed == set()
    consumer.expect(giver.kv, held_in(blocks), local)
    consumer.check_bytes()


def test_a_preempted_prefill_is_pulled_again_from_other_blocks(giver: GiverProcess, taker: Consumer) -> None:
    pull_first_half(giver, taker)
    giver.spoil(BLOCKS[:2])
    others = [70, 71, 72, 73]
    giver.step("r", others[:2], 0, HALF, "resumed")
    giver.write(others[:2])
    giver.end()
    wait_early(taker, bytes_of(taker, 2))
    giver.step("r", others[2:], HALF, HALF)
    giver.write(others[2:])
    giver.end()
    giver.finish("r", others)
    taker.wait(1)
    assert taker.failed == set()
    taker.expect(giver.kv, held_in(others), LOCAL)
    taker.check_bytes()


def test_a_prefill_preempted_behind_our_back_is_pulled_again(giver: GiverProcess, taker: Consumer) -> None:
    """What D has seen last is of the first attempt; the same blocks were rubbish for a while."""
    follow(taker, begin(giver))
    giver.spoil(BLOCKS[:2])
    giver.write(BLOCKS[:2], [])
    giver.end()
    wait_early(taker, bytes_of(taker, 2))
    giver.step("r", BLOCKS, 0, TOKENS, "resumed")
    giver.write(BLOCKS)
    giver.end()
    giver.finish("r", BLOCKS)
    check(giver, taker)


def test_blocks_that_move_without_a_word_are_not_trusted(giver: GiverProcess, taker: Consumer) -> None:
    """No vLLM does that: the sealed table decides, whatever was told before."""
    pull_first_half(giver, taker)
    giver.spoil(BLOCKS[:2])
    others = [70, 71, *BLOCKS[2:]]
    giver.step("r", BLOCKS[2:], HALF, HALF)
    giver.write(others)
    giver.end()
    giver.finish("r", others)
    taker.wait(1)
    assert taker.failed == set()
    taker.expect(giver.kv, held_in(others), LOCAL)
    taker.check_bytes()


@pytest.mark.parametrize("transport", ["cma", "tcp"])
def test_a_link_that_is_lost_half_way_costs_what_was_pulled(
    start_giver: StartGiver, start_taker: StartTaker, transport: str
) -> None:
    giver, consumer = start_giver(transport=transport), start_taker(transport=transport, peer_backoff_s=0.05)
    pull_first_half(giver, consumer)
    consumer.datadist.unlink_clusters([_native.ClusterInfo(P_CLUSTER)], 1000, True)
    finish(giver)
    check(giver, consumer)
    assert consumer.observer.handshakes == 2
    assert consumer.observer.pulls[0].num_bytes == bytes_of(consumer, 4)


def test_an_aborted_prefill_fails_the_pull_at_once(giver: GiverProcess, taker: Consumer) -> None:
    pull_first_half(giver, taker, deadline_s=3600.0)
    giver.abort("r")
    taker.wait(1)
    assert (taker.failed, taker.invalid) == ({"r"}, set(LOCAL))
    assert taker.observer.failures == [Failure.LEASE]


def test_a_killed_p_fails_the_pull(giver: GiverProcess, taker: Consumer) -> None:
    pull_first_half(giver, taker, deadline_s=3600.0)
    giver.kill()
    taker.wait(1)
    assert (taker.failed, taker.invalid) == ({"r"}, set(LOCAL))


def test_a_stopped_p_fails_the_pull_at_the_deadline_and_no_sooner(giver: GiverProcess, taker: Consumer) -> None:
    follow(taker, begin(giver), deadline_s=DEADLINE_S)
    since = time.monotonic()  # the deadline is put off by what comes after this
    giver.write(BLOCKS[:2])
    giver.end()
    wait_early(taker, bytes_of(taker, 2))
    giver.stop()
    taker.wait(1)
    assert time.monotonic() - since >= DEADLINE_S
    assert taker.observer.failures == [Failure.DEADLINE]
    giver.resume()


def test_progress_puts_the_deadline_off(giver: GiverProcess, taker: Consumer) -> None:
    follow(taker, begin(giver, BLOCK_SIZE), deadline_s=DEADLINE_S)
    for at in range(len(BLOCKS)):
        if at:
            giver.step("r", BLOCKS[at : at + 1], at * BLOCK_SIZE, BLOCK_SIZE)
        until = time.monotonic() + 1.2 * DEADLINE_S / len(BLOCKS)  # all of them take longer than the deadline
        wait_until(lambda until=until: time.monotonic() > until, "a slow chunk")  # type: ignore[misc]
        giver.write(BLOCKS[at : at + 1])
        giver.end()
        wait_early(taker, bytes_of(taker, at + 1))
    giver.finish("r", BLOCKS)
    check(giver, taker)


def test_a_cancelled_pull_gives_its_blocks_back_and_p_hears_of_it(giver: GiverProcess, taker: Consumer) -> None:
    remote = begin(giver)
    follow(taker, remote, deadline_s=3600.0)
    giver.write(BLOCKS[:2])
    giver.end()
    wait_early(taker, bytes_of(taker, 2))
    taker.driver.cancel("r")
    taker.wait(1)
    assert taker.failed == set()
    with closing(open_client(Trust())) as client:
        wait_for(client, client.release(giver.endpoint, [TOKEN], WAIT_S))
    assert giver.is_withdrawn(TOKEN)
    before = taker.memory.copy()
    finish(giver)
    assert giver.held() == 0
    assert (taker.memory == before).all()


def test_requests_that_take_one_hand_off_have_blocks_of_their_own(giver: GiverProcess, taker: Consumer) -> None:
    """The choices of one prompt (n > 1)."""
    remote = begin(giver)
    tables = [LOCAL, [20, 21, 22, 23], [30, 40, 50, 61]]
    for index, local in enumerate(tables):
        follow(taker, remote, local, request_id=f"r{index}")
    giver.write(BLOCKS[:2])
    giver.end()
    finish(giver)
    taker.wait(len(tables))
    assert taker.failed == set()
    for local in tables:
        taker.expect(giver.kv, held_in(BLOCKS), local)
    taker.check_bytes()


def test_a_name_that_is_taken_is_given_once(giver: GiverProcess, ask: Callable[..., HandoffNews]) -> None:
    giver.promise("r", TOKEN, TOKENS)
    giver.promise("other", TOKEN, TOKENS)
    giver.step("other", BLOCKS, 0, TOKENS, "first")
    assert ask().state == "promised"
    params = giver.finish("other", BLOCKS)
    assert params["datadist"]["token"] != TOKEN
    assert ask().state == "promised"
    assert ask(OTHER_TOKEN).state == "unknown"


def test_a_lease_of_an_awaited_hand_off_lasts(giver: GiverProcess, taker: Consumer) -> None:
    """D knows of it from the start: it need not claim it anew."""
    follow(taker, begin(giver))
    finish_tokens = bytes_of(taker, 2)
    giver.write(BLOCKS[:2])
    giver.end()
    wait_early(taker, finish_tokens)
    finish(giver)
    check(giver, taker)
    assert giver.held() == 1
