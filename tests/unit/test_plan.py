"""Tensors of P in, tensors of D out: pairing and plan against an oracle that knows bytes only by token and head.

For random models and random geometries on both sides: every byte of D's blocks that a token needs is written exactly
once, with P's byte of the same layer, head and token, and nothing else is written; or the pair is refused.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from support.kv_model import (
    FORMS,
    Attention,
    Engine,
    Layer,
    Linear,
    Rank,
    Side,
    make_ranks,
    noise,
    state_rows,
    token_rows,
)

from vllm_datadist_connector.protocol.handshake import K_TRANSPOSED, PLAIN, RankGeometry
from vllm_datadist_connector.worker.pairing import MismatchError, Pairing, find_gaps, pair, sources
from vllm_datadist_connector.worker.plan import NULL_BLOCK, PlanError, TokenRange, plan_pull

OPAQUE = "cpu-amx"
WINDOW = 8


class Request:
    """One request's tokens, and its block tables on P and on D."""

    def __init__(self, p: Side, d: Side, num_tokens: int, first: int, windows: Sequence[int], seed: int) -> None:
        self.first, self.end, self.p_sizes = first, num_tokens, p.block_sizes
        source = random.Random(seed)
        self.p_tables = tuple(_table(source, p, group, 0, num_tokens, window) for group, window in enumerate(windows))
        self.d_tables = tuple(
            _table(source, d, group, first, num_tokens, window) for group, window in enumerate(windows)
        )

    @property
    def tokens(self) -> TokenRange:
        return TokenRange(self.first, self.end, self.p_tables, self.d_tables, self.end)


def _table(source: random.Random, side: Side, group: int, first: int, end: int, window: int) -> tuple[int, ...]:
    size = side.block_sizes[group]
    if not size:
        return (source.randrange(1, side.num_blocks),)
    begin = first // size
    table = source.sample(range(1, side.num_blocks), -(-end // size) - begin)
    if window:
        # Blocks that end before the window are given back.
        table = [NULL_BLOCK if (begin + i + 1) * size <= end - window else block for i, block in enumerate(table)]
    return tuple(table)


def fill(rank: Rank, request: Request) -> None:
    """What a prefill leaves in P's memory."""
    for layer in rank.layers.values():
        table = request.p_tables[layer.group]
        if isinstance(layer, Linear):
            for what, row in state_rows(rank, layer, table[0]):
                row.copy_(noise(layer.name, what, size=row.numel()).view(row.shape))
            continue
        size = rank.side.block_sizes[layer.group]
        for token in range(request.end):
            block = table[token // size]
            for head in rank.heads(layer.heads) if block else ():
                rows = token_rows(rank, layer, head, block, token % size)
                content = noise(layer.name, head, token, size=layer.content)
                for part, row in zip(content.chunk(len(rows)), rows, strict=True):
                    row.copy_(part)


def check(rank: Rank, request: Request) -> None:
    """What D must have."""
    for layer in rank.layers.values():
        table = request.d_tables[layer.group]
        if isinstance(layer, Linear):
            for what, row in state_rows(rank, layer, table[0]):
                assert torch.equal(row.flatten(), noise(layer.name, what, size=row.numel())), (layer.name, what)
            continue
        size = rank.side.block_sizes[layer.group]
        begin = request.first // size
        for token in range(begin * size, request.end):
            block = table[token // size - begin]
            # With blocks finer than D's, P has given back what only the window's first block of D still spans.
            on_p = request.p_tables[layer.group][token // request.p_sizes[layer.group]]
            assert on_p or token < request.end - WINDOW
            for head in rank.heads(layer.heads) if block and on_p else ():
                got = torch.cat(token_rows(rank, layer, head, block, token % size))
                assert torch.equal(got, noise(layer.name, head, token, size=layer.content)), (layer.name, head, token)


def check_writes(engine: Engine, request: Request) -> None:
    """Each byte at most once, and only inside the request's own blocks."""
    for spec in engine.dst.specs:
        layout, ratio = spec.layout, 1
        table = [block for block in request.d_tables[layout.group] if block]
        if layout.block_tokens:
            ratio = engine.dst.side.block_sizes[layout.group] // layout.block_tokens
        for addr in spec.addrs:
            writes = engine.writes[addr]
            assert writes.max() <= 1
            for block in {entry * ratio + i for entry in table for i in range(ratio)}:
                start = block * layout.block_stride
                writes[start : start + layout.block_bytes] = 0
            assert not writes.any(), "written outside the request's blocks"


def transfer(layers: Sequence[Layer], p: Side, d: Side, request: Request) -> None:
    """Prefill on P, pull on every rank of D, compare. Raises MismatchError as the handshake would."""
    groups = len(p.block_sizes)
    p_ranks = make_ranks(layers, p)
    for rank in p_ranks:
        fill(rank, request)
    geometries = {(rank.pp_rank, rank.tp_rank): (rank, rank.geometry(groups)) for rank in p_ranks}
    for rank in make_ranks(layers, d):
        ours = rank.geometry(groups)
        met: list[tuple[Rank, RankGeometry, list[Pairing]]] = []
        for place in sources(ours, p.tp, p.pp):
            source, theirs = geometries[place]
            met.append((source, theirs, pair(ours, theirs)))
        gaps = find_gaps(ours, [pairing for _, _, pairings in met for pairing in pairings])
        assert not gaps
        engine = Engine(rank)
        for source, theirs, pairings in met:
            for pull in plan_pull(ours, theirs, pairings, request.tokens):
                engine.pull(source, pull)
        check(rank, request)
        check_writes(engine, request)


HEADS = st.sampled_from([1, 2, 4])
PARALLEL = st.sampled_from([1, 2, 4])
SIZES = st.sampled_from([2, 4, 8, 16, 32])


@st.composite
def models(draw: st.DrawFn) -> list[Layer]:
    """One to five layers: attention of one or two groups, or attention and linear attention."""
    count = draw(st.integers(1, 5))
    hybrid = draw(st.booleans())
    layers: list[Layer] = []
    for index in range(count):
        group, name = draw(st.integers(0, 1)), f"model.layers.{index * 7 % 12}.attn"
        if hybrid and group == 1:
            layers.append(Linear(name, 1, keys=4, values=8, value_heads=4))
        else:
            layers.append(Attention(name, group, draw(HEADS), draw(st.sampled_from([2, 6, 8]))))
    return layers


@st.composite
def sides(draw: st.DrawFn, layers: Sequence[Layer], form: str, packing: str) -> Side:
    states = any(isinstance(layer, Linear) for layer in layers)
    ratio = draw(st.sampled_from([1, 1, 2]))
    sizes = [draw(SIZES), draw(SIZES)]
    return Side(
        tp=draw(PARALLEL),
        pp=draw(st.integers(1, 3)),
        block_sizes=(sizes[0], 0 if states else sizes[1]),
        num_blocks=64,
        kernel_ratio=ratio,
        form=form,
        heads_first=packing != PLAIN or draw(st.booleans()),
        packing=packing,
        padding=draw(st.sampled_from([0, 0, 64, 192])),
        channels_first=draw(st.booleans()),
    )


@st.composite
def pairs(draw: st.DrawFn) -> tuple[list[Layer], Side, Side, Request]:
    layers = draw(models())
    form = draw(st.sampled_from(FORMS))
    packing = draw(st.sampled_from([PLAIN, K_TRANSPOSED, OPAQUE])) if form == FORMS[0] else PLAIN
    p, d = draw(sides(layers, form, packing)), draw(sides(layers, form, packing))
    if packing == OPAQUE and draw(st.booleans()):
        d = replace(d, block_sizes=p.block_sizes, kernel_ratio=p.kernel_ratio)
    num_tokens = draw(st.integers(1, 40))
    size = max(d.block_sizes)
    first = draw(st.integers(0, num_tokens - 1)) // size * size
    windows = (0, draw(st.sampled_from([0, 0, WINDOW])))
    return layers, p, d, Request(p, d, num_tokens, first, windows, draw(st.integers(0, 2**32)))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pairs())
def test_every_byte_once_or_refused(case: tuple[list[Layer], Side, Side, Request]) -> None:
    layers, p, d, request = case
    splits_rows = d.packing == OPAQUE and (p.block_sizes != d.block_sizes or p.kernel_ratio != d.kernel_ratio)
    try:
        transfer(layers, p, d, request)
    except MismatchError as error:
        event("refused")
        if not splits_rows or "block size" not in str(error):
            raise
    else:
        event("moved")


DENSE: list[Layer] = [Attention(f"layers.{i}", 0, 4, 8) for i in range(3)]
LATENT: list[Layer] = [Attention(f"layers.{i}", 0, 1, 6) for i in range(3)]
MIXED: list[Layer] = [Attention(f"layers.{i}", i % 2, 2, 4) for i in range(4)]
HYBRID: list[Layer] = [
    Linear(f"layers.{i}", 1, 4, 8, 4) if i % 2 else Attention(f"layers.{i}", 0, 2, 4) for i in range(4)
]
BASE = Side(tp=1, pp=1, block_sizes=(16, 16), num_blocks=32)


def test_equal_geometries_move_whole_blocks() -> None:
    """The common case costs one block id per block and one call per cache, as if nothing else were possible."""
    (rank,) = make_ranks(DENSE, BASE)
    geometry = rank.geometry(2)
    request = Request(BASE, BASE, num_tokens=70, first=16, windows=(0, 0), seed=1)
    (pull,) = plan_pull(geometry, geometry, pair(geometry, geometry), request.tokens)
    assert pull.granule == geometry.caches[0].block_bytes
    assert tuple(pull.src_blocks) == request.p_tables[0][1:]
    assert tuple(pull.dst_blocks) == request.d_tables[0]
    assert pull.num_bytes == 4 * 3 * geometry.caches[0].block_bytes


NAMED: dict[str, tuple[list[Layer], Side, Side]] = {
    "P 2 > D 1": (DENSE, replace(BASE, tp=2), BASE),
    "P 1 < D 2": (DENSE, BASE, replace(BASE, tp=2)),
    "P 8 > D 1, heads replicated": (DENSE, replace(BASE, tp=8), BASE),
    "P 1 < D 8, heads replicated": (DENSE, BASE, replace(BASE, tp=8)),
    "P 8 and D 2, latent": (LATENT, replace(BASE, tp=8), replace(BASE, tp=2)),
    "PP 3 on P, PP 2 on D": (DENSE, replace(BASE, pp=3), replace(BASE, pp=2)),
    "TP 2 x PP 2 on P, TP 4 on D": (MIXED, replace(BASE, tp=2, pp=2), replace(BASE, tp=4)),
    "blocks of 16 on P, of 32 on D": (DENSE, BASE, replace(BASE, block_sizes=(32, 32))),
    "blocks of 32 on P, of 8 on D": (DENSE, replace(BASE, block_sizes=(32, 32)), replace(BASE, block_sizes=(8, 8))),
    "NHD on P, HND on D, TP 1 < 2": (DENSE, replace(BASE, heads_first=False), replace(BASE, tp=2)),
    "(channels, tokens) on P, (tokens, channels) on D": (
        HYBRID,
        replace(BASE, block_sizes=(16, 0)),
        replace(BASE, tp=2, block_sizes=(16, 0), channels_first=False),
    ),
    "linear attention, TP 2 > 1": (
        HYBRID,
        replace(BASE, tp=2, block_sizes=(16, 0)),
        replace(BASE, block_sizes=(16, 0)),
    ),
    "linear attention, TP 1 < 4": (HYBRID, replace(BASE, block_sizes=(16, 0)), replace(BASE, tp=4, block_sizes=(8, 0))),
}


@pytest.mark.parametrize(("layers", "p", "d"), NAMED.values(), ids=NAMED.keys())
@pytest.mark.parametrize("form", FORMS)
def test_topologies(layers: list[Layer], p: Side, d: Side, form: str) -> None:
    request = Request(p, d, num_tokens=100, first=32, windows=(0, WINDOW), seed=3)
    transfer(layers, replace(p, form=form), replace(d, form=form), request)


@pytest.mark.parametrize("sizes", [(32, 8), (8, 32), (16, 16)])
@pytest.mark.parametrize("tp", [(1, 2), (2, 1)])
def test_transposed_k(sizes: tuple[int, int], tp: tuple[int, int]) -> None:
    """As vLLM's CPU attention keeps it: every element of K in a lane of its own."""
    p, d = (
        replace(BASE, packing=K_TRANSPOSED, tp=tp[side], block_sizes=(sizes[side], sizes[side])) for side in range(2)
    )
    transfer(DENSE, p, d, Request(p, d, num_tokens=100, first=32, windows=(0, WINDOW), seed=3))


def test_finer_views_are_no_finer_than_needed() -> None:
    """Shards of a block move as wholes: four heads of 16 tokens are four blocks of the view, not 64."""
    (p_rank,), d_ranks = make_ranks(DENSE, BASE), make_ranks(DENSE, replace(BASE, tp=2))
    theirs, ours = p_rank.geometry(2), d_ranks[1].geometry(2)
    (pairing,) = pair(ours, theirs)
    assert pairing.granule == 16 * 8
    assert pairing.src_offsets.tolist() == [2, 3]
    assert pairing.dst_offsets.tolist() == [0, 1]


def geometries() -> tuple[RankGeometry, RankGeometry, list[Pairing]]:
    (p_rank,), (d_rank,) = make_ranks(DENSE, BASE), make_ranks(DENSE, BASE)
    ours, theirs = d_rank.geometry(1), p_rank.geometry(1)
    return ours, theirs, pair(ours, theirs)


BAD: dict[str, tuple[TokenRange, str]] = {
    "no group": (TokenRange(0, 16, (), ((1,),), 16), "no remote blocks for KV cache group 0"),
    "P's table is short": (TokenRange(0, 33, ((1, 2),), ((1, 2, 3),), 33), "do not reach token 33"),
    "our table is short": (TokenRange(16, 49, ((1, 2, 3, 4),), ((1, 2),), 49), "do not reach token 49"),
    "P's block is outside": (TokenRange(0, 16, ((32,),), ((1,),), 16), r"remote block ids 32\.\.32, allowed: 0\.\.31"),
    "P's block is negative": (TokenRange(0, 16, ((-1,),), ((1,),), 16), "remote block ids -1"),
    "our block is outside": (TokenRange(0, 16, ((1,),), ((32,),), 16), "local block ids 32"),
    "P gave it back": (TokenRange(0, 32, ((0, 2),), ((3, 4),), 32), "P no longer has token 0"),
}


@pytest.mark.parametrize(("tokens", "text"), BAD.values(), ids=BAD.keys())
def test_tables_that_do_not_fit(tokens: TokenRange, text: str) -> None:
    ours, theirs, pairings = geometries()
    with pytest.raises(PlanError, match=text):
        plan_pull(ours, theirs, pairings, tokens)


def test_null_blocks_of_ours_are_left_out() -> None:
    ours, theirs, pairings = geometries()
    (pull,) = plan_pull(ours, theirs, pairings, TokenRange(0, 48, ((0, 5, 6),), ((0, 7, 8),), 48))
    assert (pull.src_blocks.tolist(), pull.dst_blocks.tolist()) == ([5, 6], [7, 8])
    assert plan_pull(ours, theirs, pairings, TokenRange(0, 16, ((0,),), ((0,),), 16)) == []


@pytest.mark.parametrize(
    ("remote", "local", "held", "text"),
    [
        ((1, 2), (1,), 16, "2 remote states"),
        ((), (1,), 16, "0 remote states"),
        ((0,), (1,), 16, "null block"),
        ((1,), (0,), 16, "null"),
        # vLLM took fewer tokens than it was offered.
        ((1,), (1,), 20, "P's state is that after 20 tokens, not 16"),
    ],
)
def test_a_state_is_one_block(remote: tuple[int, ...], local: tuple[int, ...], held: int, text: str) -> None:
    side = replace(BASE, block_sizes=(16, 0))
    (rank,) = make_ranks(HYBRID, side)
    geometry = rank.geometry(2)
    tokens = TokenRange(0, 16, ((1,), remote), ((1,), local), held)
    with pytest.raises(PlanError, match=text):
        plan_pull(geometry, geometry, pair(geometry, geometry), tokens)


def replaced(change: Callable[[Side], Side], layers: list[Layer] = DENSE) -> tuple[RankGeometry, RankGeometry]:
    (p_rank, *_), (d_rank, *_) = make_ranks(layers, change(BASE)), make_ranks(DENSE, BASE)
    return d_rank.geometry(1), p_rank.geometry(1)


def test_block_sizes_that_do_not_divide_are_refused_with_both() -> None:
    ours, theirs = replaced(lambda side: replace(side, block_sizes=(24, 24)))
    with pytest.raises(MismatchError, match=r"block size of layer .*: ours 16 tokens, theirs 24"):
        pair(ours, theirs)


def test_packed_blocks_of_different_sizes_are_refused_with_both() -> None:
    (p_rank,) = make_ranks(DENSE, replace(BASE, packing=OPAQUE, block_sizes=(32, 32)))
    (d_rank,) = make_ranks(DENSE, replace(BASE, packing=OPAQUE))
    with pytest.raises(MismatchError, match=r"block size of layer .*: ours 16 tokens, theirs 32; .* packed \(plain\)"):
        pair(d_rank.geometry(1), p_rank.geometry(1))


CHANGED: dict[str, tuple[list[Layer], str]] = {
    "number of heads": ([replace(layer, heads=2) for layer in DENSE if isinstance(layer, Attention)], "total of layer"),
    "content": ([replace(layer, content=16) for layer in DENSE if isinstance(layer, Attention)], "row_bytes of layer"),
}


@pytest.mark.parametrize(("layers", "text"), CHANGED.values(), ids=CHANGED.keys())
def test_other_shapes_are_refused_with_both(layers: list[Layer], text: str) -> None:
    ours, theirs = replaced(lambda side: side, layers)
    with pytest.raises(MismatchError, match=rf"{text} 'layers\.0' and 2 more: ours \d+, theirs \d+"):
        pair(ours, theirs)


def test_a_layer_that_p_lacks_is_named() -> None:
    ours, theirs = replaced(lambda side: side, DENSE[:2])
    (gap,) = find_gaps(ours, pair(ours, theirs))
    assert "layer 'layers.2': P has no such layer" in gap


def test_a_layer_that_only_p_has_stays_there() -> None:
    ours, theirs = replaced(lambda side: side, [*DENSE, Attention("draft.0", 0, 4, 8)])
    assert find_gaps(ours, pair(ours, theirs)) == []


def test_copies_of_heads_are_shared_out_among_readers() -> None:
    """Eight P ranks with four heads: four D ranks do not all read the first copy."""
    p_ranks, d_ranks = make_ranks(DENSE, replace(BASE, tp=8)), make_ranks(DENSE, replace(BASE, tp=4))
    read = [sources(rank.geometry(1), 8, 1)[0].tp_rank for rank in d_ranks]
    assert read == [0, 3, 4, 7]
    assert len(p_ranks) == 8
    assert np.unique(read).size == 4
