"""The pull plan against an oracle that copies block by block."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.pd import make_cache, make_geometry

from vllm_datadist_connector.protocol.handshake import RankGeometry
from vllm_datadist_connector.protocol.params import BlockIds
from vllm_datadist_connector.worker.plan import PlanError, plan_pull

GROUPS = 3
OUR_BLOCKS, THEIR_BLOCKS = 20, 30

blocks_of_a_group = st.lists(
    st.tuples(st.integers(0, THEIR_BLOCKS - 1), st.integers(0, OUR_BLOCKS - 1)), max_size=12, unique_by=lambda p: p[1]
)


@st.composite
def geometries(draw: st.DrawFn) -> tuple[RankGeometry, RankGeometry]:
    """Two compatible ranks whose cache ids and block counts differ."""
    shapes = draw(st.lists(st.tuples(st.integers(0, GROUPS - 1), st.integers(1, 4)), min_size=1, max_size=4))
    sides = []
    for side, num_blocks in enumerate((OUR_BLOCKS, THEIR_BLOCKS)):
        caches = [
            make_cache(
                cache_id=100 * side + index + 1,
                group=group,
                num_blocks=num_blocks,
                block_bytes=8 * (index + 1),
                layers=tuple(f"{index}.{layer}" for layer in range(layers)),
            )
            for index, (group, layers) in enumerate(shapes)
        ]
        sides.append(make_geometry(caches=tuple(caches)))
    return sides[0], sides[1]


@given(geometries(), st.lists(blocks_of_a_group, min_size=GROUPS, max_size=GROUPS))
def test_moves_what_the_oracle_moves(
    sides: tuple[RankGeometry, RankGeometry], groups: list[list[tuple[int, int]]]
) -> None:
    ours, theirs = sides
    remote: BlockIds = tuple(tuple(r for r, _ in group) for group in groups)
    local: BlockIds = tuple(tuple(own for _, own in group) for group in groups)

    expected = {
        (their.cache_id, r, our.cache_id, own)
        for our, their in zip(ours.caches, theirs.caches, strict=True)
        for r, own in groups[our.group]
    }
    pulls = plan_pull(ours, theirs, remote, local)
    moved = [
        (pull.src_cache_id, r, pull.dst_cache_id, own)
        for pull in pulls
        for r, own in zip(pull.src_blocks, pull.dst_blocks, strict=True)
    ]
    assert set(moved) == expected
    assert len(moved) == len(expected)
    assert all(pull.src_blocks for pull in pulls)
    assert sum(pull.num_bytes for pull in pulls) == sum(
        len(groups[cache.group]) * cache.block_bytes * len(cache.layers) for cache in ours.caches
    )


def test_order_is_kept() -> None:
    (pull,) = plan_pull(make_geometry(), make_geometry(), ((5, 1, 3),), ((0, 7, 2),))
    assert (pull.src_blocks, pull.dst_blocks) == ((5, 1, 3), (0, 7, 2))


@pytest.mark.parametrize(
    ("remote", "local", "text"),
    [
        (((1,), (1,)), ((1,),), "2 remote KV cache groups for 1"),
        (((1, 2),), ((1,),), "2 remote blocks for 1"),
        (((8,),), ((1,),), r"remote block ids 8\.\.8, P has 8"),
        (((-1,),), ((1,),), r"remote block ids -1\.\.-1"),
        (((1,),), ((8,),), r"local block ids 8\.\.8, we have 8"),
        (((1,),), ((-1,),), r"local block ids -1"),
    ],
)
def test_ids_that_do_not_fit(remote: BlockIds, local: BlockIds, text: str) -> None:
    with pytest.raises(PlanError, match=text):
        plan_pull(make_geometry(), make_geometry(), remote, local)
