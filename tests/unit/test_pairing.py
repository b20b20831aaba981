"""Pairing beyond test_plan.py: a rank with itself, copies of shards, and bounds on what a peer may make of it."""

from __future__ import annotations

import re
import tracemalloc
from dataclasses import replace

import pytest
from support.kv_model import Attention, Side, make_ranks
from support.pd import make_cache, make_geometry, make_segment

from vllm_datadist_connector.protocol.handshake import K_TRANSPOSED, RankGeometry, Segment, View
from vllm_datadist_connector.worker import pairing as pairing_module
from vllm_datadist_connector.worker.pairing import (
    MAX_GRANULES,
    MismatchError,
    Terms,
    find_gaps,
    pair,
    pair_with_itself,
    sources,
)


def state_rank(tp_rank: int, tp_size: int, *segments: Segment) -> RankGeometry:
    """A rank with one layer of states."""
    end = max(each.offset + each.count * each.row_bytes for each in segments)
    cache = make_cache(
        block_tokens=0,
        block_stride=end,
        block_bytes=end,
        segments=segments,
        layers=("layers.0",),
        views=(View(granule=4, cache_id=1),),
    )
    return make_geometry(tp_rank=tp_rank, tp_size=tp_size, block_sizes=(0,), caches=(cache,))


def state(total: int, first: int, count: int, offset: int) -> Segment:
    return Segment(
        offset=offset, total=total, first=first, count=count, shard_stride=4, rows=1, row_bytes=4, row_tokens=0
    )


def mamba2_rank(tp_rank: int, tp_size: int) -> RankGeometry:
    """x is dealt out; of B and C, of one group, every rank has all eight channels."""
    count = 8 // tp_size
    x = state(8, tp_rank * count, count, 0)
    return state_rank(tp_rank, tp_size, x, state(8, 0, 8, count * 4), state(8, 0, 8, count * 4 + 32))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_copies_of_many_shards_come_from_several_ranks(tp_size: int) -> None:
    ours = mamba2_rank(0, 1)
    pairings = [pair(ours, mamba2_rank(rank.tp_rank, tp_size)) for rank in sources(ours, tp_size, 1)]
    assert len(pairings) == tp_size
    assert find_gaps(ours, [each for found in pairings for each in found]) == []


ATTENTION = [Attention(f"layers.{i}", 0, 2, 8) for i in range(3)]
LATENT = [Attention(f"layers.{i}", 0, 1, 8) for i in range(3)]


def attention_ranks(layers: list[Attention], tp_size: int) -> list[RankGeometry]:
    side = Side(tp=tp_size, pp=1, block_sizes=(16,), num_blocks=8)
    return [rank.geometry(1) for rank in make_ranks(layers, side)]


ITSELF: dict[str, list[RankGeometry]] = {
    "TP 1": attention_ranks(ATTENTION, 1),
    "a head each": attention_ranks(ATTENTION, 2),
    "copies of heads": attention_ranks(ATTENTION, 4),
    "copies of a latent": attention_ranks(LATENT, 2),
    "copies of many shards": [mamba2_rank(rank, 2) for rank in range(2)],
}


@pytest.mark.parametrize("ranks", ITSELF.values(), ids=ITSELF.keys())
def test_a_rank_has_all_that_it_needs_itself(ranks: list[RankGeometry]) -> None:
    for rank in ranks:
        pairings = pair_with_itself(rank)
        assert find_gaps(rank, pairings) == []
        for pairing in pairings:
            assert (pairing.src, pairing.src_first) == (rank.caches[pairing.dst_index], pairing.dst_first)
            assert pairing.src_offsets.tolist() == pairing.dst_offsets.tolist()
            assert len(pairing.src_offsets) * pairing.granule == pairing.dst.block_bytes


@pytest.mark.parametrize("over", [0, 1])
def test_a_chunk_of_too_many_blocks_is_refused(monkeypatch: pytest.MonkeyPatch, over: int) -> None:
    """P says which views it has: one of single bytes would have us list a gigabyte's worth of offsets."""
    assert MAX_GRANULES == 1 << 20
    monkeypatch.setattr(pairing_module, "MAX_GRANULES", 64 - over)
    ours, theirs = make_geometry(), make_geometry(caches=(make_cache(views=(View(granule=1, cache_id=1),)),))
    if over:
        with pytest.raises(MismatchError, match=r"layer 'layers\.0' and 1 more: 64 blocks of 1 bytes, allowed: 63"):
            pair(ours, theirs)
    else:
        (pairing,) = pair(ours, theirs)
        assert pairing.src_offsets.tolist() == list(range(64))


def test_blocks_as_large_as_a_peer_may_claim_are_refused_before_their_offsets_are_listed() -> None:
    large = make_cache(
        block_stride=2**40,
        block_bytes=2**40,
        segments=(make_segment(rows=1, row_bytes=2**40, row_tokens=16),),
        views=(View(granule=1, cache_id=1),),
    )
    with pytest.raises(MismatchError, match=f"{2**40} blocks of 1 bytes, allowed: {MAX_GRANULES}"):
        pair(make_geometry(caches=(large,)), make_geometry(caches=(large,)))


def test_equal_sides_are_not_taken_apart() -> None:
    """A transposed K of usual size has 131072 rows of four bytes; on the driver thread they would delay every pull."""
    layers = [Attention(f"layers.{i}", 0, heads=8, content=1024) for i in range(2)]
    side = Side(tp=1, pp=1, block_sizes=(128,), num_blocks=2, packing=K_TRANSPOSED)
    (ours,), (theirs, _) = ([rank.geometry(1) for rank in make_ranks(layers, replace(side, tp=tp))] for tp in (1, 2))
    for given, runs in ((ours, 1), (theirs, 1)):
        tracemalloc.start()
        (pairing,) = pair(ours, given)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(pairing.src_offsets) == runs
        assert peak < 100_000


# ---- what a provider demands ----

NHD = Side(tp=1, pp=1, block_sizes=(16,), num_blocks=4, form="K and V", heads_first=False)


def test_runs_that_cut_blocks_too_short_are_refused_with_both_sides() -> None:
    layers = [Attention(f"layers.{i}", 0, heads=4, content=64) for i in range(2)]
    (p_rank,), d_ranks = make_ranks(layers, NHD), make_ranks(layers, replace(NHD, tp=2))
    theirs, ours = p_rank.geometry(1), d_ranks[1].geometry(1)
    assert pair(ours, theirs, Terms(min_run_bytes=64))
    told = (
        "layer 'layers.0:0' and 3 more: blocks are cut into runs of 64 bytes, allowed with this provider: at least 65: "
        "ours have 2 of 4 shards in a rank of 2, blocks of 16 tokens, "
        "theirs have 4 of 4 shards in a rank of 1, blocks of 16 tokens"
    )
    with pytest.raises(MismatchError, match=re.escape(told)):
        pair(ours, theirs, Terms(min_run_bytes=65))


def test_whole_blocks_are_as_short_as_they_are() -> None:
    """An index's scales of a block are 256 bytes: to move them so is the best that can be done."""
    (rank,) = make_ranks([Attention("layers.0", 0, heads=1, content=2)], replace(NHD, block_sizes=(16,)))
    geometry = rank.geometry(1)
    assert pair(geometry, geometry, Terms(min_run_bytes=4096))


def test_a_pairing_takes_a_view_that_both_have_where_ours_are_all_there_will_be() -> None:
    theirs = make_geometry(caches=(make_cache(views=(View(granule=64, cache_id=1), View(granule=32, cache_id=2))),))
    ours = make_geometry(caches=(make_cache(views=(View(granule=32, cache_id=9), View(granule=16, cache_id=8))),))
    (pairing,) = pair(ours, theirs)
    assert (pairing.granule, pairing.src_cache_id) == (64, 1), "ours is made when the first pull needs it"
    (pairing,) = pair(ours, theirs, Terms(own_views_only=True))
    assert (pairing.granule, pairing.src_cache_id) == (32, 2)
    neither = make_geometry(caches=(make_cache(views=(View(granule=16, cache_id=8),)),))
    told = r"P registered blocks of \[64, 32\] bytes, we of \[16\], none of which divides 64"
    with pytest.raises(MismatchError, match=told):
        pair(neither, theirs, Terms(own_views_only=True))


def test_a_view_of_several_caches_says_where_each_begins() -> None:
    theirs = make_geometry(caches=(make_cache(views=(View(granule=32, cache_id=1, first=100),)),))
    ours = make_geometry(caches=(make_cache(views=(View(granule=32, cache_id=9, first=7),)),))
    (pairing,) = pair(ours, theirs)
    assert (pairing.src_offsets.tolist(), pairing.dst_offsets.tolist()) == ([100, 101], [7, 8])


def test_elements_of_another_kind_are_refused_where_both_say_which() -> None:
    """As wide as each other: nothing else would tell."""
    int8, fp8, silent = (make_geometry(caches=(make_cache(dtype=kind),)) for kind in ("int8", "float8_e4m3fn", ""))
    for ours, theirs in ((int8, int8), (int8, silent), (silent, fp8)):
        assert pair(ours, theirs)
    with pytest.raises(
        MismatchError, match=r"^dtype of layer 'layers\.0' and 1 more: ours int8, theirs float8_e4m3fn$"
    ):
        pair(int8, fp8)
