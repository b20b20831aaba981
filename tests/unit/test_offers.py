"""Offers of blocks: what P may write into, and that they are our own again when nobody writes there any more."""

from __future__ import annotations

from typing import Any, cast

import msgspec
import numpy as np
import pytest
from support.pd import BLOCK_SIZE, TOKEN, make_cache, make_geometry, make_params, make_segment, make_ticket

from vllm_datadist_connector import _native
from vllm_datadist_connector.metadata import PullJob
from vllm_datadist_connector.protocol.handshake import RankGeometry, View
from vllm_datadist_connector.protocol.offers import OfferError, decode_offer, encode_offer
from vllm_datadist_connector.protocol.params import parse_remote_prefill
from vllm_datadist_connector.side_channel.client import ChannelAnswer, ChannelClient, HandoffNews, Offered, Refused
from vllm_datadist_connector.side_channel.endpoint import Endpoint
from vllm_datadist_connector.worker.following import Followed, Mover, Source
from vllm_datadist_connector.worker.instances import Instance, InstanceKey
from vllm_datadist_connector.worker.offers import GRACE_S, Offers, writable_blocks
from vllm_datadist_connector.worker.pairing import Pairing, pair
from vllm_datadist_connector.worker.transfers import Transfer

P = Endpoint("127.0.0.1", 1)


def geometry(cluster_id: int, stride: int = 4 * BLOCK_SIZE, block: int | None = None, **more: Any) -> RankGeometry:
    granule = int(np.gcd(stride, stride if block is None else block))
    cache = make_cache(
        block_stride=stride,
        block_bytes=stride if block is None else block,
        segments=(make_segment(rows=BLOCK_SIZE, row_bytes=4, row_stride=4),),
        views=(View(granule=granule, cache_id=3), View(granule=4, cache_id=4)),
    )
    return make_geometry(cluster_id=cluster_id, caches=(cache,), pushes=True, **more)


class Engine:
    """Notes grants; `busy`: those under which a write runs."""

    def __init__(self) -> None:
        self.granted: dict[int, tuple[int, list[list[int]]]] = {}
        self.revoked: list[int] = []
        self.busy: set[int] = set()
        self.status = _native.LLM_SUCCESS

    def grant_writes(self, cluster_id: int, blocks: list[tuple[int, Any]]) -> tuple[int, int]:
        grant = len(self.granted) + 1
        self.granted[grant] = cluster_id, [[cache_id, *ids.tolist()] for cache_id, ids in blocks]
        return self.status, grant

    def revoke_writes(self, grant: int) -> int:
        self.revoked.append(grant)
        return _native.LLM_LINK_BUSY if grant in self.busy else _native.LLM_SUCCESS


class Client:
    def __init__(self) -> None:
        self.offered: list[tuple[Any, ...]] = []
        self.fits = True

    def offer(self, *arguments: Any) -> int:
        if not self.fits:
            raise ValueError("too large")
        self.offered.append(arguments)
        return len(self.offered)


class Side:
    """A D rank with one transfer from one P rank."""

    def __init__(self, can_grant: bool = True, **theirs: Any) -> None:
        self.engine, self.client = Engine(), Client()
        self.ours, self.theirs = geometry(9), msgspec.structs.replace(geometry(7), **theirs)
        self.offers = Offers(
            cast("_native.LlmDataDist", self.engine), self.ours, cast("ChannelClient", self.client), 1.0, can_grant
        )
        remote = parse_remote_prefill(make_params(((1, 2),), ticket=make_ticket()))
        instance = Instance(InstanceKey(P, "e", "i"), met_at=0.0, last_used=0.0)
        job = PullJob("r", remote, ((5, 6),), 0, 2 * BLOCK_SIZE, "", False, 1.0, is_handoff=True, is_pushed=True)
        self.transfer = Transfer(job, remote, instance, cast("Any", None), accepted_at=0.0, deadline=1.0)
        source = Source(P, TOKEN, 2 * BLOCK_SIZE)
        self.followed = Followed.start(source, self.ours, self.theirs, pair(self.ours, self.theirs))

    def make(self) -> bool:
        return self.offers.make(self.transfer, self.followed)

    def hear(self, delivery: str, epoch: int = 1, num_bytes: int = 0) -> None:
        news = HandoffNews("sealed", 1, 1, 1, None, 0, 0, 0, b"", "", delivery, epoch, num_bytes, 0, 0.0, "")
        self.offers.hear(self.transfer, self.followed, news)

    def ended(self, now: float = 0.0) -> list[Followed]:
        return [followed for _, followed in self.offers.take_ended(now)]


def pairing(ours: RankGeometry) -> list[Pairing]:
    return pair(ours, msgspec.structs.replace(ours, cluster_id=7))


def written(ours: RankGeometry, *tables: tuple[int, ...]) -> list[tuple[int, list[int]]]:
    return [(cache_id, blocks.tolist()) for cache_id, blocks in writable_blocks(ours, pairing(ours), tables)]


def test_whole_blocks_may_be_written_and_no_null_block() -> None:
    assert written(geometry(9), (5, 0, 6)) == [(3, [5, 6])]


def test_what_lies_between_blocks_may_not_be_written() -> None:
    ours = geometry(9, stride=6 * BLOCK_SIZE, block=4 * BLOCK_SIZE)
    assert written(ours, (1, 3)) == [(3, [3, 4, 9, 10])]


def test_a_table_of_larger_blocks_names_several_each() -> None:
    ours = geometry(9, block_sizes=(2 * BLOCK_SIZE,))
    assert written(ours, (2,)) == [(3, [4, 5])]


def test_an_offer_is_granted_before_it_is_made() -> None:
    side = Side()
    assert side.make()
    assert side.engine.granted == {1: (7, [[3, 5, 6]])}
    ((endpoint, token, rank, offer_id, blob, _),) = side.client.offered
    assert (endpoint, token, rank) == (P, TOKEN, (0, 0))
    assert offer_id == side.followed.offer_id > 0
    offer = decode_offer(blob)
    assert (offer.local_blocks, offer.first_token, offer.end_token) == (((5, 6),), 0, 2 * BLOCK_SIZE)
    assert msgspec.msgpack.decode(offer.geometry, type=RankGeometry) == side.ours
    assert side.transfer.is_written


def test_nothing_is_offered_where_it_could_not_be_taken_back() -> None:
    side = Side(can_grant=False)
    assert not side.make()
    assert (side.engine.granted, side.client.offered) == ({}, [])


def test_nothing_is_offered_to_who_does_not_push() -> None:
    side = Side(pushes=False)
    assert not side.make()
    assert side.engine.granted == {}


def test_what_cannot_be_granted_or_told_is_pulled() -> None:
    side = Side()
    side.engine.status = _native.LLM_PARAM_INVALID
    assert not side.make()
    assert side.client.offered == []
    side.engine.status, side.client.fits = _native.LLM_SUCCESS, False
    assert not side.make()
    assert side.engine.revoked == [2]
    assert not side.transfer.is_written
    assert side.followed.mover is Mover.PULL


@pytest.mark.parametrize("answer", [Refused("no"), None])
def test_an_offer_that_p_does_not_take_is_withdrawn(answer: Refused | None) -> None:
    side = Side()
    side.make()
    assert side.offers.on_answer(ChannelAnswer(1, answer, "", False))
    assert side.followed.mover is Mover.WITHDRAWN
    assert side.ended() == [side.followed]
    assert side.followed.mover is Mover.PULL
    assert not side.transfer.is_written
    assert side.ended() == []


def test_an_offer_that_p_takes_stands() -> None:
    side = Side()
    side.make()
    assert side.offers.on_answer(ChannelAnswer(1, Offered(), "", False))
    assert not side.offers.on_answer(ChannelAnswer(1, Offered(), "", False)), "it was answered"
    assert side.followed.mover is Mover.OFFERED
    assert side.engine.revoked == []


def test_blocks_are_our_own_when_the_last_write_has_ended() -> None:
    side = Side()
    side.make()
    side.engine.busy.add(1)
    side.hear("failed")
    assert side.engine.revoked == [1], "at once: nothing more begins"
    assert side.ended() == []
    assert side.transfer.is_written
    assert side.offers.next_wake() is not None
    side.engine.busy.clear()
    assert side.ended() == [side.followed]
    assert not side.transfer.is_written
    assert side.offers.next_wake() is None


def test_a_write_that_does_not_end_is_told_of_once() -> None:
    side = Side()
    side.make()
    side.engine.busy.add(1)
    side.offers.withdraw(side.transfer)
    assert side.offers.take_stuck(0.0, 5.0) == []
    assert side.offers.take_stuck(float("inf"), 5.0) == [side.transfer]
    assert side.offers.take_stuck(float("inf"), 5.0) == []
    side.engine.busy.clear()
    assert side.ended() == [side.followed]


def sealed(side: Side, epoch: int = 1) -> None:
    side.followed.is_sealed, side.followed.epoch = True, epoch


def test_what_p_has_written_counts_once_it_is_all_and_of_the_sealed_epoch() -> None:
    side = Side()
    side.make()
    side.followed.epoch = 1
    side.hear("done", num_bytes=64)
    assert side.followed.mover is Mover.OFFERED, "more may become final"
    sealed(side, epoch=2)
    side.hear("done", num_bytes=64)
    assert side.followed.mover is Mover.OFFERED, "of an epoch that a preemption has ended"
    side.hear("done", epoch=2, num_bytes=128)
    assert side.ended() == [side.followed]
    assert side.followed.mover is Mover.PUSHED
    assert side.followed.is_settled
    assert (side.transfer.num_bytes, side.transfer.pushed_bytes) == (128, 128)


def test_a_rank_that_never_takes_an_offer_is_pulled_from() -> None:
    side = Side()
    side.make()
    side.hear("offered")
    assert side.offers.next_wake() is None, "the prefill goes on"
    sealed(side)
    side.hear("offered")
    wake = side.offers.next_wake()
    assert wake is not None
    assert side.ended(wake - GRACE_S / 2) == []
    assert side.ended(wake) == [side.followed]
    assert side.followed.mover is Mover.PULL


def test_a_rank_that_takes_it_late_goes_on() -> None:
    side = Side()
    side.make()
    sealed(side)
    side.hear("offered")
    side.hear("running")
    assert side.ended(float("inf")) == []
    assert side.followed.mover is Mover.OFFERED


@pytest.mark.parametrize("tokens", [(5, 5, 9), (6, 5, 9), (0, 10, 9)])
def test_offers_of_no_tokens_are_refused(tokens: tuple[int, int, int]) -> None:
    first, end, held = tokens
    with pytest.raises(OfferError, match="tokens"):
        decode_offer(encode_offer(b"", ((1,),), first, end, held))


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", msgspec.msgpack.encode({"geometry": "x"})])
def test_malformed_offers_are_refused(data: bytes) -> None:
    with pytest.raises(OfferError, match=r"^offer: "):
        decode_offer(data)
