"""Hand-offs: a D rank gets what a P computes while it computes it, byte for byte, and every event on the way.

Whatever is not said otherwise happens to both movers: D that pulls, and P that pushes into blocks that D has offered.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import Any

import msgspec
import pytest
from support.channels import wait_for
from support.consumer import D_CLUSTER, Consumer
from support.giver_process import GiverProcess
from support.kv_ranks import LAYERS, Place
from support.pd import BLOCK_SIZE, OTHER_TOKEN, TOKEN, WAIT_S, make_geometry, wait_until

from vllm_datadist_connector import _native
from vllm_datadist_connector.labels import Failure
from vllm_datadist_connector.metadata import PullJob
from vllm_datadist_connector.protocol.offers import encode_offer
from vllm_datadist_connector.protocol.params import RemotePrefill, decode_prefill
from vllm_datadist_connector.side_channel.client import ChannelClient, HandoffNews, Offered, open_client
from vllm_datadist_connector.side_channel.endpoint import Trust
from vllm_datadist_connector.worker.transfers import Transfer

P_CLUSTER = 100
BLOCKS = [5, 63, 511, 17]
LOCAL = [9, 2, 60, 3]
TOKENS = len(BLOCKS) * BLOCK_SIZE
HALF = TOKENS // 2
DEADLINE_S = 4.0
"""Within which a chunk comes, however busy the machine is."""

StartGiver = Callable[..., GiverProcess]
StartTaker = Callable[..., Consumer]


@pytest.fixture(params=["pull", "push"])
def mover(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def start_giver(resources: ExitStack, mover: str) -> StartGiver:
    def start(cluster_id: int = P_CLUSTER, **settings: Any) -> GiverProcess:
        giver = GiverProcess(cluster_id, **({"pushes": mover == "push"} | settings))
        resources.callback(giver.kill)
        return giver

    return start


@pytest.fixture
def giver(start_giver: StartGiver) -> GiverProcess:
    return start_giver()


@pytest.fixture
def start_taker(start_consumer: Callable[..., Consumer], mover: str) -> StartTaker:
    def start(**settings: Any) -> Consumer:
        return start_consumer(access="granted" if mover == "push" else "none", **settings)

    return start


@pytest.fixture
def taker(start_taker: StartTaker) -> Consumer:
    return start_taker()


@pytest.fixture
def ask(giver: GiverProcess) -> Iterator[Callable[..., HandoffNews]]:
    """What the side channel tells of a hand-off that differs from what was seen."""
    with closing(open_client(Trust())) as client:

        def about(token: str = TOKEN, rank: tuple[int, int] | None = None, version: int = 0) -> HandoffNews:
            answer = wait_for(client, client.await_handoff(giver.endpoint, token, rank, version, 0, 1.0, WAIT_S))
            assert isinstance(answer.response, HandoffNews), answer.error
            return answer.response

        yield about


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


def delivery(client: ChannelClient, giver: GiverProcess, offer_id: int) -> str:
    sent = client.await_handoff(giver.endpoint, TOKEN, (0, 0), 0, 0, 0.0, WAIT_S, offer_id)
    news = wait_for(client, sent).response
    assert isinstance(news, HandoffNews)
    return news.delivery


def check_mover(consumer: Consumer) -> None:
    """All was moved by whom it was to be moved by."""
    (transfer,) = consumer.observer.pulls
    assert transfer.pushed_bytes == (transfer.num_bytes if consumer.offers else 0)


def held_in(blocks: Sequence[int]) -> Any:
    class Held:
        remote_block_ids = (tuple(blocks),)

    return Held


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


@pytest.mark.parametrize("mover", ["push"], indirect=True)
@pytest.mark.parametrize("transport", ["cma", "tcp"])
class TestOffers:
    """What P does, or does not, with blocks that it was offered."""

    def test_a_p_that_cannot_push_is_pulled_from(
        self, start_giver: StartGiver, start_taker: StartTaker, transport: str
    ) -> None:
        giver, taker = start_giver(transport=transport, pushes=False), start_taker(transport=transport)
        pull_first_half(giver, taker)
        finish(giver)
        check(giver, taker)
        assert taker.observer.pulls[0].pushed_bytes == 0

    def test_what_no_rank_takes_is_pulled_once_the_prefill_is_done(
        self, start_giver: StartGiver, start_taker: StartTaker, transport: str
    ) -> None:
        giver, taker = start_giver(transport=transport, listens=False), start_taker(transport=transport)
        follow(taker, begin(giver))
        giver.write(BLOCKS[:2])
        giver.end()
        finish(giver)
        check(giver, taker)
        assert taker.observer.pulls[0].pushed_bytes == 0

    def test_what_p_may_not_write_is_pulled(
        self, start_giver: StartGiver, start_consumer: Callable[..., Consumer], transport: str
    ) -> None:
        """Our engine refuses the first push: D hears of it at once, and pulls while the prefill goes on."""
        giver, taker = start_giver(transport=transport), start_consumer(access="none", transport=transport)
        taker.offers = True
        pull_first_half(giver, taker)
        finish(giver)
        check(giver, taker)
        assert taker.observer.pulls[0].pushed_bytes == 0
        assert taker.observer.handshakes == 1

    def test_a_push_that_fails_half_way_is_pulled(
        self, start_giver: StartGiver, start_taker: StartTaker, transport: str
    ) -> None:
        giver, taker = start_giver(transport=transport), start_taker(transport=transport, peer_backoff_s=0.05)
        pull_first_half(giver, taker)
        giver.cut(D_CLUSTER)
        finish(giver)
        check(giver, taker)
        (transfer,) = taker.observer.pulls
        assert (transfer.num_bytes, transfer.pushed_bytes) == (bytes_of(taker, 4), 0)

    def test_a_write_that_does_not_end_costs_the_link(
        self, start_giver: StartGiver, start_taker: StartTaker, transport: str
    ) -> None:
        """As the engine tells of a peer that is frozen in the middle of a push."""
        giver, taker = start_giver(transport=transport), start_taker(transport=transport, pull_timeout_s=0.5)
        pull_first_half(giver, taker, deadline_s=3600.0)

        class Engine:
            def revoke_writes(self, grant: int) -> int:
                status, report = taker.datadist.query_link(P_CLUSTER)
                is_linked = status == _native.LLM_SUCCESS and report is not None and report.alive
                return _native.LLM_LINK_BUSY if is_linked else taker.datadist.revoke_writes(grant)

        taker.driver._offers._datadist = Engine()  # type: ignore[assignment]
        taker.driver.cancel("r")
        wait_until(lambda: taker.driver.quarantined_blocks() == len(LOCAL), "blocks that are kept back")
        taker.wait(1)
        assert taker.driver.quarantined_blocks() == 0
        assert taker.linked() == 0

    def test_offers_of_strangers_cost_the_others_nothing(
        self, start_giver: StartGiver, start_taker: StartTaker, transport: str
    ) -> None:
        giver, taker = start_giver(transport=transport), start_taker(transport=transport)
        follow(taker, begin(giver))
        valid = msgspec.msgpack.encode(make_geometry(cluster_id=5))
        endless = msgspec.msgpack.encode(make_geometry(cluster_id=5, block_sizes=(BLOCK_SIZE,) * 2, caches=()))
        blobs = [b"", b"\xc1" * 100, encode_offer(b"", ((1,),), 0, TOKENS, TOKENS)]
        blobs += [encode_offer(each, ((2**40,),), 0, TOKENS, TOKENS) for each in (valid, endless)]
        blobs += [encode_offer(valid, (), 0, 2**31 - 1, 2**31 - 1)]
        with closing(open_client(Trust())) as client:
            for index, blob in enumerate(blobs):
                sent = client.offer(giver.endpoint, TOKEN, (0, 0), index + 1, blob, WAIT_S)
                assert wait_for(client, sent).response == Offered()
            giver.write(BLOCKS[:2])
            giver.end()
            wait_early(taker, bytes_of(taker, 2))
            for index in range(len(blobs)):
                wait_until(lambda index=index: delivery(client, giver, index + 1) != "offered", "an answer")  # type: ignore[misc]
                assert delivery(client, giver, index + 1) in ("failed", "running", "done")
        finish(giver)
        check(giver, taker)
        check_mover(taker)

    def test_two_ds_get_the_same(self, start_giver: StartGiver, start_taker: StartTaker, transport: str) -> None:
        giver = start_giver(transport=transport)
        takers = [start_taker(place=Place(rank, 0, 2, 1), transport=transport) for rank in range(2)]
        remote = begin(giver)
        for taker in takers:
            follow(taker, remote)
        giver.write(BLOCKS[:2])
        giver.end()
        for taker in takers:
            wait_early(taker, bytes_of(taker, 2))
        finish(giver)
        for taker in takers:
            check(giver, taker)
            check_mover(taker)

    def test_a_d_that_leaves_costs_the_others_nothing(
        self, start_giver: StartGiver, start_taker: StartTaker, transport: str
    ) -> None:
        giver = start_giver(transport=transport)
        leaves, stays = (start_taker(place=Place(rank, 0, 2, 1), transport=transport) for rank in range(2))
        remote = begin(giver)
        follow(leaves, remote)
        follow(stays, remote)
        giver.write(BLOCKS[:2])
        giver.end()
        for taker in (leaves, stays):
            wait_early(taker, bytes_of(taker, 2))
        leaves.close()
        finish(giver)
        check(giver, stays)
        check_mover(stays)


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
