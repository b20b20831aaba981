"""Pure layout mapping: (our geometry, a P rank's geometry) -> Pairings, which hold for every later pull from that rank.

    layers by name ──> runs of tensors that lie side by side in a cache of ours and in one of theirs
    segments ──> shards that this P rank owns for us ──> byte runs of one chunk of tokens ──> blocks of a common view

The unit is the *chunk*: as many tokens as the smaller of the two blocks holds, so that a chunk never crosses a block.
Where both blocks are equal it is the whole block, and one run of bytes if the same shards lie in the same order.

Each shard has exactly one owner among P's ranks, so the Pairings with all of them write every byte of ours once;
find_gaps() says what none of them has. No sockets, no state, no block ids.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from vllm_datadist_connector.protocol.handshake import CacheLayout, RankGeometry, Segment, View, decode_geometry

Int64s: TypeAlias = "NDArray[np.int64]"

MAX_GRANULES = 1 << 20
"""Of one chunk. A peer chooses offsets and views: such that would cut a block into more are refused."""


class MismatchError(ValueError):
    """Two ranks cannot exchange blocks; says which field, with both values."""


class Terms(NamedTuple):
    """What a provider demands of transfers."""

    own_views_only: bool = False
    """Our memory is addressed by the views that we have registered: no others can be made any more."""
    min_run_bytes: int = 0
    """Runs of bytes that cut blocks into shorter ones are not worth moving."""


ANY = Terms()


class Rank(NamedTuple):
    pp_rank: int
    tp_rank: int


@dataclass(frozen=True, slots=True, eq=False)
class Pairing:
    """Tensors [src_first, +num_layers) of a cache of P and [dst_first, +num_layers) of ours, and what moves in a chunk.

    Offsets and steps count granules: the blocks of the finer views by which both sides address their memory.
    """

    src: CacheLayout
    dst: CacheLayout
    dst_index: int
    """Of dst among our caches."""
    src_first: int
    dst_first: int
    num_layers: int
    chunk_tokens: int
    """0: a block holds a state."""
    granule: int
    src_cache_id: int
    """P's view of that granule."""
    src_offsets: Int64s
    dst_offsets: Int64s
    src_steps: Int64s
    """Granules from a chunk of a block to its next chunk; it differs by segment."""
    dst_steps: Int64s
    shards: tuple[int, ...]
    """How many of our shards this P rank gives, per segment."""


def owner(total: int, tp_size: int, shard: int, spread: int) -> int:
    """The TP rank, of `tp_size`, from which one shard is taken.

    Fewer shards than ranks are replicated, as vLLM does with KV heads; `spread` chooses among the copies, so that
    several readers do not all take the first.
    """
    if total >= tp_size:
        return shard * tp_size // total
    copies = tp_size // total
    return shard * copies + spread % copies


def sources(ours: RankGeometry, tp_size: int, pp_size: int) -> list[Rank]:
    """Ranks of a P of that size that may hold KV of ours: which layers a stage has is known only by asking it."""
    needed = {
        owner(segment.total, tp_size, shard, ours.tp_rank)
        for cache in ours.caches
        for segment in cache.segments
        for shard in range(segment.first, segment.first + segment.count)
    }
    return [Rank(pp_rank, tp_rank) for pp_rank in range(pp_size) for tp_rank in sorted(needed)]


def pair(ours: RankGeometry, theirs: RankGeometry, terms: Terms = ANY) -> list[Pairing]:
    """What this rank of P gives us; empty if it has none of our layers or shards.

    Raises:
        MismatchError: a layer that both have cannot be moved from their layout to ours.
    """
    place = {layer: (cache, i) for cache in reversed(theirs.caches) for i, layer in enumerate(cache.layers)}
    pairings = []
    for index, dst in enumerate(ours.caches):
        for run in _runs(dst, place):
            _check_tables(ours, theirs, dst, run.src)
            pairing = _pair_caches(ours, theirs, dst, index, run, terms)
            if pairing is not None:
                pairings.append(pairing)
    return pairings


def pair_with_itself(ours: RankGeometry) -> list[Pairing]:
    """What a rank gives itself: all that it has, also shards of which another rank holds the copy that peers take."""
    return pair(ours, msgspec.structs.replace(ours, tp_rank=0, tp_size=1))


def rehearse(ours: RankGeometry) -> None:
    """Reads and pairs a geometry, as for the first peer; nobody waits for it yet.

    What is made on first use (decoders, parts of numpy) takes some 8 ms of computing; beside a step thread that wants
    the interpreter too it kept the first request waiting for 15 to 30.
    """
    with contextlib.suppress(MismatchError):
        pair_with_itself(decode_geometry(msgspec.msgpack.encode(ours)))


def find_gaps(ours: RankGeometry, pairings: Iterable[Pairing]) -> list[str]:
    """What of our KV cache the pairings with all of P's ranks leave out, a line per layer; empty if nothing."""
    given: dict[str, list[int]] = {}
    for pairing in pairings:
        for layer in pairing.dst.layers[pairing.dst_first : pairing.dst_first + pairing.num_layers]:
            counts = given.setdefault(layer, [0] * len(pairing.shards))
            given[layer] = [old + new for old, new in zip(counts, pairing.shards, strict=True)]
    gaps = []
    for cache in ours.caches:
        wanted = [segment.count for segment in cache.segments]
        for layer in cache.layers:
            if layer not in given:
                gaps.append(f"layer {layer!r}: P has no such layer (is speculative decoding set up on one side only?)")
            elif given[layer] != wanted:
                gaps.append(f"layer {layer!r}: of our shards {wanted}, P gives {given[layer]}")
    return gaps


class _LayerRun(NamedTuple):
    src: CacheLayout
    src_first: int
    dst_first: int
    length: int


def _runs(dst: CacheLayout, place: dict[str, tuple[CacheLayout, int]]) -> Iterator[_LayerRun]:
    """Maximal runs of layers of ours that follow one another in one cache of theirs, too."""
    run: _LayerRun | None = None
    for index, layer in enumerate(dst.layers):
        src, at = place.get(layer, (None, 0))
        if run is not None and src is run.src and at == run.src_first + run.length:
            run = run._replace(length=run.length + 1)
            continue
        if run is not None:
            yield run
        run = _LayerRun(src, at, index, 1) if src is not None else None
    if run is not None:
        yield run


def _check_tables(ours: RankGeometry, theirs: RankGeometry, dst: CacheLayout, src: CacheLayout) -> None:
    for side, geometry, cache in (("ours", ours, dst), ("theirs", theirs, src)):
        table = geometry.block_sizes[cache.group]
        if table != cache.block_tokens and (not cache.block_tokens or table % cache.block_tokens):
            raise MismatchError(f"{_what(dst)}: {side} has blocks of {cache.block_tokens} tokens in a table of {table}")


def _pair_caches(
    ours: RankGeometry, theirs: RankGeometry, dst: CacheLayout, dst_index: int, run: _LayerRun, terms: Terms
) -> Pairing | None:
    src = run.src
    if dst.dtype and src.dtype and dst.dtype != src.dtype:
        raise MismatchError(f"dtype of {_what(dst)}: ours {dst.dtype}, theirs {src.dtype}")
    chunk = _chunk_tokens(dst, src)
    if len(dst.segments) != len(src.segments):
        raise MismatchError(f"{_what(dst)}: our blocks have {len(dst.segments)} segments, theirs {len(src.segments)}")
    split = dst.block_tokens != src.block_tokens
    pieces, shards = [], []
    for our, their in zip(dst.segments, src.segments, strict=True):
        _check_segments(dst, src, our, their, chunk, ours.contract.kv_packing)
        first, count = _owned(our, theirs, ours.tp_rank)
        if count and not (their.first <= first and first + count <= their.first + their.count):
            have = f"{their.first}..{their.first + their.count - 1}"
            want = f"{first}..{first + count - 1}"
            raise MismatchError(f"{_what(dst)}: P's TP rank {theirs.tp_rank} has shards {have}, not {want}")
        shards.append(count)
        if count:
            pieces.append(_piece(our, their, first, count, chunk, whole=not split))
    if not pieces:
        return None
    src_runs, dst_runs, lengths, src_steps, dst_steps = _merged(pieces, whole=not split)
    common = math.gcd(src.block_stride, dst.block_stride)
    for values in (src_runs, dst_runs, lengths, src_steps, dst_steps) if split else (src_runs, dst_runs, lengths):
        common = math.gcd(common, int(np.gcd.reduce(values)))
    shortest = int(lengths.min())
    if shortest < min(terms.min_run_bytes, dst.block_bytes, src.block_bytes):
        raise MismatchError(
            f"{_what(dst)}: blocks are cut into runs of {shortest} bytes, allowed with this provider: at least"
            f" {terms.min_run_bytes}: {_cut('ours', ours, dst)}, {_cut('theirs', theirs, src)}; give both sides as many"
            " heads in a rank, and the same block size"
        )
    view, first = _choose_view(dst, src, common, terms)
    granule = view.granule
    repeats = lengths // granule
    if int(repeats.sum()) > MAX_GRANULES:
        raise MismatchError(f"{_what(dst)}: {int(repeats.sum())} blocks of {granule} bytes, allowed: {MAX_GRANULES}")
    within = np.arange(int(repeats.sum())) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    return Pairing(
        src=src,
        dst=dst,
        dst_index=dst_index,
        src_first=run.src_first,
        dst_first=run.dst_first,
        num_layers=run.length,
        chunk_tokens=chunk,
        granule=granule,
        src_cache_id=view.cache_id,
        src_offsets=np.repeat(src_runs // granule, repeats) + within + view.first,
        dst_offsets=np.repeat(dst_runs // granule, repeats) + within + first,
        src_steps=np.repeat(src_steps // granule, repeats),
        dst_steps=np.repeat(dst_steps // granule, repeats),
        shards=tuple(shards),
    )


def _choose_view(dst: CacheLayout, src: CacheLayout, common: int, terms: Terms) -> tuple[View, int]:
    """P's coarsest view whose blocks divide `common`, and the block at which our cache begins in ours."""
    own = {view.granule: view.first for view in dst.views}
    fitting = [
        view for view in src.views if common % view.granule == 0 and (view.granule in own or not terms.own_views_only)
    ]
    if fitting:
        view = max(fitting, key=lambda each: each.granule)
        return view, own.get(view.granule, 0)
    theirs = f"P registered blocks of {[view.granule for view in src.views]} bytes"
    ours = f", we of {sorted(own, reverse=True)}" if terms.own_views_only else ""
    raise MismatchError(f"{_what(dst)}: {theirs}{ours}, none of which divides {common}")


def _cut(side: str, geometry: RankGeometry, cache: CacheLayout) -> str:
    segment = cache.segments[0]
    shards = f"{segment.count} of {segment.total} shards in a rank of {geometry.tp_size}"
    return f"{side} have {shards}, blocks of {cache.block_tokens} tokens"


def _chunk_tokens(dst: CacheLayout, src: CacheLayout) -> int:
    small, large = sorted((dst.block_tokens, src.block_tokens))
    if small == large:
        return small
    if not small or large % small:
        raise MismatchError(
            f"block size of {_what(dst)}: ours {dst.block_tokens} tokens, theirs {src.block_tokens}; one must divide "
            "the other"
        )
    return small


def _check_segments(dst: CacheLayout, src: CacheLayout, our: Segment, their: Segment, chunk: int, packing: str) -> None:
    if dst.block_tokens != src.block_tokens and (our.row_tokens != their.row_tokens or chunk % our.row_tokens):
        raise MismatchError(
            f"block size of {_what(dst)}: ours {dst.block_tokens} tokens, theirs {src.block_tokens}; the KV cache is "
            f"packed ({packing}) in rows of {our.row_tokens} tokens on our side and {their.row_tokens} on theirs, and "
            "a row cannot be split: give both sides the same block size"
        )
    for name in ("total", "lanes", "row_bytes", "row_tokens"):
        if getattr(our, name) != getattr(their, name):
            raise MismatchError(f"{name} of {_what(dst)}: ours {getattr(our, name)}, theirs {getattr(their, name)}")
    if not our.row_tokens and our.rows != their.rows:
        raise MismatchError(f"rows of {_what(dst)}: ours {our.rows}, theirs {their.rows}")


def _owned(our: Segment, theirs: RankGeometry, spread: int) -> tuple[int, int]:
    """(first, count) of our shards that are taken from that rank; they follow one another."""
    mine = [
        shard
        for shard in range(our.first, our.first + our.count)
        if owner(our.total, theirs.tp_size, shard, spread) == theirs.tp_rank
    ]
    return (mine[0], len(mine)) if mine else (0, 0)


_Piece: TypeAlias = tuple[Int64s, Int64s, Int64s, Int64s, Int64s]
"""Byte runs of one segment's first chunk: source, destination, length, and the step of each to the next chunk."""


def _piece(our: Segment, their: Segment, first: int, count: int, chunk: int, whole: bool) -> _Piece:
    rows, lanes, row_bytes = chunk // our.row_tokens if our.row_tokens else our.rows, our.lanes, our.row_bytes
    if whole and _inside(our) == _inside(their) and _is_solid(our):
        # Of a transposed K of usual size there are 100 000 rows of four bytes, which would take tens of milliseconds.
        rows, lanes, row_bytes = 1, 1, row_bytes * rows * lanes
    shard, lane, row = np.ogrid[first : first + count, 0:lanes, 0:rows]

    def at(segment: Segment) -> Int64s:
        within = lane * segment.lane_stride + row * segment.row_stride
        offsets = segment.offset + (shard - segment.first) * segment.shard_stride + within
        return np.asarray(offsets, dtype=np.int64).ravel()

    def constant(value: int) -> Int64s:
        return np.full(count * lanes * rows, value, dtype=np.int64)

    return (
        at(their),
        at(our),
        constant(row_bytes),
        constant(rows * their.row_stride),
        constant(rows * our.row_stride),
    )


def _inside(segment: Segment) -> tuple[int, ...]:
    """Where the bytes of a shard lie from its start on."""
    return segment.lanes, segment.lane_stride, segment.rows, segment.row_stride, segment.row_bytes


def _is_solid(segment: Segment) -> bool:
    """Whether the bytes of a shard are one run, row by row and lane by lane."""
    lane_bytes = segment.rows * segment.row_bytes
    rows_touch = segment.rows == 1 or segment.row_stride == segment.row_bytes
    return rows_touch and (segment.lanes == 1 or segment.lane_stride == lane_bytes)


def _merged(pieces: Sequence[_Piece], whole: bool) -> _Piece:
    """Runs in the order of their destination, those that go on on both sides joined.

    `whole`: a chunk is a block, there is no next chunk in it, and steps do not matter.
    """
    columns: list[Any] = [np.concatenate(column) for column in zip(*pieces, strict=True)]
    if whole:
        columns[3:] = [np.zeros_like(columns[0])] * 2
    order = np.argsort(columns[1], kind="stable")
    src, dst, length, src_step, dst_step = (column[order] for column in columns)
    joins = (
        (src[1:] == src[:-1] + length[:-1])
        & (dst[1:] == dst[:-1] + length[:-1])
        & (src_step[1:] == src_step[:-1])
        & (dst_step[1:] == dst_step[:-1])
    )
    starts = np.flatnonzero(np.concatenate(([True], ~joins)))
    return src[starts], dst[starts], np.add.reduceat(length, starts), src_step[starts], dst_step[starts]


def _what(cache: CacheLayout) -> str:
    others = f" and {len(cache.layers) - 1} more" if len(cache.layers) > 1 else ""
    return f"layer {cache.layers[0]!r}{others}"
