"""push_cache and push_blocks between two nodes, byte for byte with guards, by every transport."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.datadist_cluster import Cluster, failure
from support.datadist_peer import Peer, RemoteCache

from vllm_datadist_connector.llm_datadist import BlocksCacheKey, CacheKeyByIdAndIndex, LLMStatusCode

SHAPE = {"tensors": 6, "rows": 6, "row_bytes": 40}
BLOCKS = {**SHAPE, "layout": "blocks"}

Ends = tuple[Peer, Peer]


@pytest.fixture
def ends(cluster: Cluster) -> Ends:
    """A prompt, the client, and a decoder that are linked."""
    prompt, decoder = cluster.open(1, role="PROMPT", listen=""), cluster.open(2, role="DECODER")
    prompt.link(decoder)
    return prompt, decoder


def caches(ends: Ends, src: dict[str, Any] = SHAPE, dst: dict[str, Any] = SHAPE) -> tuple[RemoteCache, RemoteCache]:
    return ends[0].register("src", **src), ends[1].register("dst", **dst)


@pytest.mark.parametrize(("src_row", "dst_row"), [(0, 0), (1, 5), (5, 1)])
def test_a_row(cluster: Cluster, ends: Ends, src_row: int, dst_row: int) -> None:
    src, dst = caches(ends)
    ends[0].manager.push_cache(dst.row(dst_row), src, src_row)
    dst.expect_rows(src, [(src_row, dst_row)])
    cluster.check()


def test_rows_and_blocks_of_another_length_are_refused(cluster: Cluster, ends: Ends) -> None:
    src, _ = caches(ends)
    src_blocks = ends[0].register("src blocks", **BLOCKS)
    for row_bytes in (30, 50):
        rows = ends[1].register(f"rows of {row_bytes}", **{**SHAPE, "row_bytes": row_bytes})
        assert failure(ends[0].manager.push_cache, rows.row(3), src, 2) == LLMStatusCode.LLM_PARAM_INVALID
        blocks = ends[1].register(f"blocks of {row_bytes}", **{**BLOCKS, "row_bytes": row_bytes})
        push = ends[0].manager.push_blocks
        assert failure(push, blocks.blocks_key, src_blocks, [2], [3]) == LLMStatusCode.LLM_PARAM_INVALID
    cluster.check()


LAYERS = [
    (range(1, 3), range(2), 2, [(2, 0), (3, 1), (4, 2), (5, 3)]),
    (range(1), range(2, 3), 2, [(0, 4), (1, 5)]),
    (range(5, 6), range(3, 4), 1, [(5, 3)]),
    (range(1, 2), range(1), 3, [(3, 0), (4, 1), (5, 2)]),
    (range(1), None, 6, [(i, i) for i in range(6)]),
    (None, range(2), 3, [(i, i) for i in range(6)]),
    (None, None, 1, [(i, i) for i in range(6)]),
]


@pytest.mark.parametrize(("src_layers", "dst_layers", "tensors_per_layer", "tensors"), LAYERS)
def test_layers(
    cluster: Cluster,
    ends: Ends,
    src_layers: range | None,
    dst_layers: range | None,
    tensors_per_layer: int,
    tensors: list[tuple[int, int]],
) -> None:
    src, dst = caches(ends)
    src_blocks, dst_blocks = ends[0].register("src blocks", **BLOCKS), ends[1].register("dst blocks", **BLOCKS)
    layers = {
        "src_layer_range": src_layers,
        "dst_layer_range": dst_layers,
        "tensor_num_per_layer": tensors_per_layer,
    }
    ends[0].manager.push_cache(dst.row(4), src, 1, **layers)
    dst.expect_rows(src, [(1, 4)], tensors)
    ends[0].manager.push_blocks(dst_blocks.blocks_key, src_blocks, [3, 4, 0], [0, 1, 5], **layers)
    dst_blocks.expect_rows(src_blocks, [(3, 0), (4, 1), (0, 5)], tensors)
    cluster.check()


def test_between_caches_of_different_depth(cluster: Cluster, ends: Ends) -> None:
    src, dst = caches(ends, dst={**SHAPE, "tensors": 2})
    push = ends[0].manager.push_cache
    push(dst.row(0), src, 0, range(2, 3), range(1))
    dst.expect_rows(src, [(0, 0)], [(4, 0), (5, 1)])
    assert failure(push, dst.row(1), src, 0, range(1), range(1, 2)) == LLMStatusCode.LLM_PARAM_INVALID
    cluster.check()


def test_the_first_layer_that_fails_ends_it_and_those_before_stay(cluster: Cluster, ends: Ends) -> None:
    src, dst = caches(ends, dst={**SHAPE, "tensors": 4})
    assert failure(ends[0].manager.push_cache, dst.row(0), src, 5) == LLMStatusCode.LLM_PARAM_INVALID
    dst.expect_rows(src, [(5, 0)], [(tensor, tensor) for tensor in range(4)])
    cluster.check()


BLOCK_LISTS = [
    ([0, 1, 3], [2, 3, 0]),
    ([1, 0], [1, 0]),
    ([0, 0], [1, 2]),
    ([1, 2, 3], [4, 4, 4]),
    (list(range(6)), list(range(6))),
]


@pytest.mark.parametrize(("src_blocks", "dst_blocks"), BLOCK_LISTS)
def test_blocks_in_list_order(cluster: Cluster, ends: Ends, src_blocks: list[int], dst_blocks: list[int]) -> None:
    src, dst = caches(ends, BLOCKS, BLOCKS)
    ends[0].manager.push_blocks(dst.blocks_key, src, src_blocks, dst_blocks)
    dst.expect_rows(src, list(zip(src_blocks, dst_blocks, strict=True)))
    cluster.check()


def test_what_is_out_of_range_moves_nothing(cluster: Cluster, ends: Ends) -> None:
    src, dst = caches(ends)
    src_blocks, dst_blocks = ends[0].register("src blocks", **BLOCKS), ends[1].register("dst blocks", **BLOCKS)
    manager = ends[0].manager
    refused: list[tuple[Callable[..., Any], list[Any], dict[str, Any]]] = [
        (manager.push_cache, [dst.row(6), src], {}),
        (manager.push_cache, [dst.row(0), src, 6], {}),
        (manager.push_cache, [dst.row(0), src], {"size": 40}),
        (manager.push_cache, [dst.row(0), src, 0, range(3, 4), range(1)], {}),
        (manager.push_cache, [dst.row(0), src, 0, range(1), range(3, 4)], {}),
        (manager.push_cache, [dst.row(0), src, 0, range(2), range(1)], {}),
        (manager.push_cache, [dst.row(0), src, 0, range(1), range(1)], {"tensor_num_per_layer": 4}),
        (manager.push_blocks, [dst_blocks.blocks_key, src_blocks, [6], [0]], {}),
        (manager.push_blocks, [dst_blocks.blocks_key, src_blocks, [0], [6]], {}),
        (manager.push_blocks, [dst_blocks.blocks_key, src_blocks, [4, 5, 6], [0, 1, 2]], {}),
        (manager.push_blocks, [dst_blocks.blocks_key, src_blocks, [0], [0, 1]], {}),
        (manager.push_blocks, [dst_blocks.blocks_key, src_blocks, [], [0]], {}),
        (manager.push_blocks, [dst_blocks.blocks_key, src, [0], [0]], {}),
        (manager.push_cache, [dst.row(0), src_blocks], {}),
    ]
    for call, arguments, named in refused:
        assert failure(call, *arguments, **named) == LLMStatusCode.LLM_PARAM_INVALID, (arguments, named)
    cluster.check()


def test_unknown_names(cluster: Cluster, ends: Ends) -> None:
    src, dst = caches(ends)
    src_blocks = ends[0].register("src blocks", **BLOCKS)
    manager = ends[0].manager
    missing = CacheKeyByIdAndIndex(2, dst.cache_id + 9)
    assert failure(manager.push_cache, missing, src) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    missing_key = BlocksCacheKey(2, 4711)
    assert failure(manager.push_blocks, missing_key, src_blocks, [0], [0]) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    unlinked = CacheKeyByIdAndIndex(77, dst.cache_id)
    assert failure(manager.push_cache, unlinked, src) == LLMStatusCode.LLM_NOT_YET_LINK
    ends[1].manager.unregister_cache(dst.cache_id)
    assert failure(manager.push_cache, dst.row(0), src) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    cluster.check()


def test_host_caches_are_not_written_unless_opened(cluster: Cluster, ends: Ends) -> None:
    src, closed = caches(ends, dst={**SHAPE, "placement": "HOST"})
    opened = ends[1].register("opened", **SHAPE, placement="HOST", remote_accessible=True)
    hidden = ends[1].register("hidden", **SHAPE, remote_accessible=False)
    push = ends[0].manager.push_cache
    for unreachable in (closed, hidden):
        assert failure(push, unreachable.row(0), src) == LLMStatusCode.LLM_PARAM_INVALID
    push(opened.row(0), src, 3)
    opened.expect_rows(src, [(3, 0)])
    cluster.check()


def test_both_ends_push_and_pull_at_once(cluster: Cluster, ends: Ends) -> None:
    """Each pushes its rows 0..2 to rows 3..5 of the other and pulls the other's rows 0..2 into a third cache."""
    mine, theirs = ends[0].register("data", **SHAPE), ends[1].register("data", **SHAPE)
    copies = [end.register("copy", **SHAPE) for end in ends]

    def work(peer: Peer, own: RemoteCache, other: RemoteCache, copy: RemoteCache) -> None:
        for row in range(3):
            peer.manager.push_cache(other.row(3 + row), own, row)
            peer.manager.pull_cache(other.row(row), copy, row)

    with ThreadPoolExecutor(2) as pool:
        for running in [
            pool.submit(work, ends[0], mine, theirs, copies[0]),
            pool.submit(work, ends[1], theirs, mine, copies[1]),
        ]:
            running.result()
    rows = [(row, 3 + row) for row in range(3)]
    mine.expect_rows(theirs, rows)
    theirs.expect_rows(mine, rows)
    copies[0].expect_rows(theirs, [(row, row) for row in range(3)])
    copies[1].expect_rows(mine, [(row, row) for row in range(3)])
    cluster.check()
