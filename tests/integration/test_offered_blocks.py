"""What P does with blocks that it was offered, or does not: D gets its KV cache, or its blocks back, in any case."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import msgspec
import pytest
from support.channels import wait_for
from support.consumer import D_CLUSTER, Consumer
from support.giver_process import GiverProcess
from support.handoffs import (
    BLOCKS,
    LOCAL,
    TOKENS,
    StartGiver,
    StartTaker,
    begin,
    bytes_of,
    check,
    check_mover,
    finish,
    follow,
    pull_first_half,
    wait_early,
)
from support.kv_ranks import Place
from support.pd import BLOCK_SIZE, TOKEN, WAIT_S, make_geometry, wait_until

from vllm_datadist_connector import _native
from vllm_datadist_connector.protocol.offers import encode_offer
from vllm_datadist_connector.side_channel.client import ChannelClient, HandoffNews, Offered, open_client
from vllm_datadist_connector.side_channel.endpoint import Trust

P_CLUSTER = 100

pytestmark = [
    pytest.mark.parametrize("mover", ["push"], indirect=True),
    pytest.mark.parametrize("transport", ["cma", "tcp"]),
]


def delivery(client: ChannelClient, giver: GiverProcess, offer_id: int) -> str:
    sent = client.await_handoff(giver.endpoint, TOKEN, (0, 0), 0, 0, 0.0, WAIT_S, offer_id)
    news = wait_for(client, sent).response
    assert isinstance(news, HandoffNews)
    return news.delivery


def test_a_p_that_cannot_push_is_pulled_from(start_giver: StartGiver, start_taker: StartTaker, transport: str) -> None:
    giver, taker = start_giver(transport=transport, pushes=False), start_taker(transport=transport)
    pull_first_half(giver, taker)
    finish(giver)
    check(giver, taker)
    assert taker.observer.pulls[0].pushed_bytes == 0


def test_what_no_rank_takes_is_pulled_once_the_prefill_is_done(
    start_giver: StartGiver, start_taker: StartTaker, transport: str
) -> None:
    giver, taker = start_giver(transport=transport, listens=False), start_taker(transport=transport)
    follow(taker, begin(giver))
    giver.write(BLOCKS[:2])
    giver.end()
    finish(giver)
    check(giver, taker)
    assert taker.observer.pulls[0].pushed_bytes == 0


def test_what_p_may_not_write_is_pulled(
    start_giver: StartGiver, start_consumer: Callable[..., Consumer], transport: str
) -> None:
    """Our engine refuses the first push: D hears of it at once, and pulls while the prefill goes on."""
    giver, taker = start_giver(transport=transport), start_consumer(access="none", transport=transport)
    taker.offers = True
    pull_first_half(giver, taker)
    finish(giver)
    check(giver, taker)
    assert taker.observer.pulls[0].pushed_bytes == 0
    assert taker.observer.handshakes == 1


def test_a_push_that_fails_half_way_is_pulled(start_giver: StartGiver, start_taker: StartTaker, transport: str) -> None:
    giver, taker = start_giver(transport=transport), start_taker(transport=transport, peer_backoff_s=0.05)
    pull_first_half(giver, taker)
    giver.cut(D_CLUSTER)
    finish(giver)
    check(giver, taker)
    (transfer,) = taker.observer.pulls
    assert (transfer.num_bytes, transfer.pushed_bytes) == (bytes_of(taker, 4), 0)


def test_a_write_that_does_not_end_costs_the_link(
    start_giver: StartGiver, start_taker: StartTaker, transport: str
) -> None:
    """As the engine tells of a peer that is frozen in the middle of a push."""
    giver, taker = start_giver(transport=transport), start_taker(transport=transport, pull_timeout_s=3.0)
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
    start_giver: StartGiver, start_taker: StartTaker, transport: str
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


def test_two_ds_get_the_same(start_giver: StartGiver, start_taker: StartTaker, transport: str) -> None:
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
    start_giver: StartGiver, start_taker: StartTaker, transport: str
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
