"""What is due of a prefill that goes on: whole blocks of final layers, each token of each layer once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pd import BLOCK_SIZE, make_cache, make_geometry, make_segment

from vllm_datadist_connector.protocol.handshake import RankGeometry, View
from vllm_datadist_connector.worker.pairing import pair
from vllm_datadist_connector.worker.plan import BlockPull, PlanError, TokenRange
from vllm_datadist_connector.worker.progress import Mark, Progress, layer_bits

NUM_BLOCKS = 64


def geometry(layers: Sequence[Sequence[str]], block_tokens: int = BLOCK_SIZE) -> RankGeometry:
    caches = tuple(
        make_cache(
            num_blocks=NUM_BLOCKS,
            block_tokens=block_tokens,
            block_stride=4 * block_tokens,
            block_bytes=4 * block_tokens,
            segments=(make_segment(rows=block_tokens),),
            layers=tuple(names),
            views=tuple(View(granule=4 * size, cache_id=10 * index + at + 1) for at, size in enumerate((32, 16, 8))),
        )
        for index, names in enumerate(layers)
    )
    return make_geometry(caches=caches, block_sizes=(block_tokens,))


def progress_of(ours: RankGeometry, theirs: RankGeometry) -> Progress:
    return Progress(ours, theirs, pair(ours, theirs))


def mask(*layers: int) -> bytes:
    bits = sum(1 << layer for layer in layers)
    return bits.to_bytes(4, "little")


def tokens(num_tokens: int, first: int = 0, known: int | None = None, block_tokens: int = BLOCK_SIZE) -> TokenRange:
    """P's blocks from 1 on, `known` tokens of them; ours from 33 on."""
    remote = range(1, 1 + -(-(num_tokens if known is None else known) // block_tokens))
    local = range(33 + first // BLOCK_SIZE, 33 + -(-num_tokens // BLOCK_SIZE))
    return TokenRange(first, num_tokens, (tuple(remote),), (tuple(local),), num_tokens, local_first=first)


def shown(pulls: Sequence[BlockPull]) -> list[tuple[tuple[int, int], list[int]]]:
    return [(pull.src_layers, pull.dst_blocks.tolist()) for pull in pulls]


THREE = geometry([["a", "b", "c"]])


def test_bits_are_numbered_cache_by_cache() -> None:
    bits = layer_bits(geometry([["a:0", "b"], ["a:1", "c"]]))
    assert bits == {"a": (0, 2), "b": (1,), "c": (3,)}


def test_written_layers_go_first_and_the_others_behind_them() -> None:
    progress = progress_of(THREE, THREE)
    whole = tokens(64)
    assert shown(progress.take(Mark(0), whole)) == []
    assert shown(progress.take(Mark(0, 32, mask(0)), whole)) == [((0, 0), [33, 34])]
    assert shown(progress.take(Mark(0, 32, mask(0, 1)), whole)) == [((1, 1), [33, 34])]
    assert shown(progress.take(Mark(32, 64, mask(0)), whole)) == [((0, 0), [35, 36]), ((2, 2), [33, 34])]
    assert shown(progress.take(None, whole)) == [((1, 2), [35, 36])]
    assert progress.take(None, whole) == []


def test_what_was_not_taken_goes_together() -> None:
    progress = progress_of(THREE, THREE)
    assert shown(progress.take(Mark(32, 64, mask(0, 1, 2)), tokens(64))) == [((0, 2), [33, 34, 35, 36])]


def test_a_partial_block_waits_but_for_the_last() -> None:
    progress = progress_of(THREE, THREE)
    assert shown(progress.take(Mark(30), tokens(40))) == [((0, 2), [33])]
    assert shown(progress.take(Mark(40), tokens(40))) == [((0, 2), [34, 35])]


def test_blocks_that_p_has_not_told_of_wait() -> None:
    progress = progress_of(THREE, THREE)
    assert shown(progress.take(Mark(64), tokens(64, known=32))) == [((0, 2), [33, 34])]
    with pytest.raises(PlanError, match="do not reach token 64"):
        progress.take(None, tokens(64, known=32))


def test_a_mark_that_goes_back_takes_nothing_twice() -> None:
    progress = progress_of(THREE, THREE)
    progress.take(Mark(32), tokens(64))
    assert progress.take(Mark(16), tokens(64)) == []
    assert shown(progress.take(Mark(48), tokens(64))) == [((0, 2), [35])]


marks = st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90), st.sets(st.integers(0, 4))), max_size=8)


@settings(max_examples=200, deadline=None)
@given(marks=marks, first=st.integers(0, 79), theirs=st.sampled_from([8, 16, 32]))
def test_every_token_of_every_layer_moves_once_and_none_before_its_time(
    marks: list[tuple[int, int, set[int]]], first: int, theirs: int
) -> None:
    d, p = geometry([["a", "b"], ["c", "d", "e"]]), geometry([["e", "d"], ["c", "b", "a"]], theirs)
    progress, end = progress_of(d, p), 80
    whole = tokens(end, first, block_tokens=theirs)
    names = [layer for cache in p.caches for layer in cache.layers]
    moved = np.zeros((5, end), int)
    final = np.zeros(5, int)
    for mark in [*(Mark(base, after, mask(*layers)) for base, after, layers in marks), None]:
        final = np.maximum(final, [end if mark is None else mark.tokens(bit) for bit in range(5)])
        for pull in progress.take(mark, whole):
            for at, layer in enumerate(range(pull.dst_layers[0], pull.dst_layers[1] + 1)):
                name = d.caches[pull.dst_index].layers[layer]
                assert name == p.caches[(pull.src_cache_id - 1) // 10].layers[pull.src_layers[0] + at]
                bit = names.index(name)
                for block in pull.dst_blocks:
                    start = int(block) * pull.granule // 4 - 33 * BLOCK_SIZE
                    covered = range(start, start + pull.granule // 4)
                    assert covered.stop <= max(final[bit], 0) or mark is None or final[bit] >= end
                    for token in covered:
                        if token < end:
                            moved[bit, token] += 1
    assert (moved[:, first:] == 1).all()
    assert (moved <= 1).all()
