"""Two-sided mode with memory pools between two nodes: keys and their ends, placements, layouts that differ."""

from __future__ import annotations

import json
from itertools import product

import pytest
from support.datadist_cluster import Cluster, failure
from support.datadist_peer import Peer

from vllm_datadist_connector.llm_datadist import BlocksCacheKey, CacheKey, LLMStatusCode

SHAPE = {"tensors": 4, "rows": 4, "row_bytes": 40}
BLOCKS = {**SHAPE, "layout": "blocks"}
NONE = 2**64 - 1
GONE = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
POOL_BYTES = 64 << 10
POOLS = dict.fromkeys(("mem_pool_cfg", "host_mem_pool_cfg"), json.dumps({"memory_size": POOL_BYTES, "page_shift": 12}))

Ends = tuple[Peer, Peer]


@pytest.fixture
def ends(cluster: Cluster) -> Ends:
    """A prompt and a decoder, the client, that are linked."""
    prompt = cluster.open(1, role="PROMPT", enable_remote_cache_accessible=False, **POOLS)
    decoder = cluster.open(2, role="DECODER", listen="", enable_remote_cache_accessible=False, **POOLS)
    decoder.link(prompt)
    return prompt, decoder


def test_a_request_key_is_consumed_and_a_prefix_key_is_not(cluster: Cluster, ends: Ends) -> None:
    prompt, decoder = ends
    request, prefix, of_model = CacheKey(1, 7), CacheKey(1, NONE, 0, 8), CacheKey(1, 7, 5)
    src = prompt.allocate("src", keys=[request, CacheKey(1, NONE), prefix, of_model], **SHAPE)
    dst = decoder.register("dst", **SHAPE)
    pull = decoder.manager.pull_cache
    pull(request, dst, 0)
    dst.expect_rows(src, [(0, 0)])
    assert failure(pull, request, dst, 1) == GONE
    for row in (1, 2):
        pull(prefix, dst, row)
        dst.expect_rows(src, [(2, row)])
    pull(of_model, dst, 3)
    dst.expect_rows(src, [(3, 3)])
    assert failure(pull, of_model, dst, 0) == GONE
    cluster.check()


def test_pulls_of_layers_consume_the_key_once_all_are_pulled(cluster: Cluster, ends: Ends) -> None:
    prompt, decoder = ends
    key = CacheKey(1, 7)
    src, dst = prompt.allocate("src", keys=[key], **SHAPE), decoder.register("dst", **SHAPE)
    pull = decoder.manager.pull_cache
    for row in (0, 1):  # the same layer twice is not the other one
        pull(key, dst, row, src_layer_range=range(1, 2), dst_layer_range=range(1))
        dst.expect_rows(src, [(0, row)], [(2, 0), (3, 1)])
    pull(key, dst, 2, 10, src_layer_range=range(1), dst_layer_range=range(1, 2))
    dst.expect_rows(src, [(0, 2)], [(0, 2), (1, 3)], size=10)
    assert failure(pull, key, dst, 3) == GONE
    cluster.check()


def test_a_pull_into_blocks_consumes_the_key(cluster: Cluster, ends: Ends) -> None:
    prompt, decoder = ends
    keys = [CacheKey(1, 7), CacheKey(1, 8)]
    src = prompt.allocate("src", keys=keys, **SHAPE)
    dst = decoder.allocate("dst", **{**BLOCKS, "row_bytes": 16})
    pull = decoder.manager.pull_blocks
    assert failure(pull, keys[1], dst, [], [0, 1, 2, 3]) == LLMStatusCode.LLM_PARAM_INVALID
    pull(keys[1], dst, [], [3, 0, 1])  # what failed has not consumed it
    dst.expect_pieces(src, 1, [3, 0, 1])
    assert failure(pull, keys[1], dst, [], [0]) == GONE
    cluster.check()


def test_blocks_keys_are_not_consumed_and_go_with_the_cache(cluster: Cluster, ends: Ends) -> None:
    prompt, decoder = ends
    src, dst = prompt.allocate("src", **BLOCKS), decoder.register("dst", **BLOCKS)
    for dst_block in (0, 3):
        decoder.manager.pull_blocks(src.blocks_key, dst, [2], [dst_block])
        dst.expect_rows(src, [(2, dst_block)])
    prompt.manager.deallocate_blocks_cache(src)
    del prompt.caches["src"]
    assert failure(decoder.manager.pull_blocks, src.blocks_key, dst, [2], [1]) == GONE
    cluster.check()


def test_keys_of_registered_memory_end_when_they_are_removed(cluster: Cluster, ends: Ends) -> None:
    prompt, decoder = ends
    key = CacheKey(1, 7)
    src, dst = prompt.register("src", keys=[key], **SHAPE), decoder.register("dst", **SHAPE)
    for row in range(3):
        decoder.manager.pull_cache(key, dst, row)
        dst.expect_rows(src, [(0, row)])
    prompt.manager.remove_cache_key(key)
    prompt.manager.remove_cache_key(key)  # a second time is nothing
    assert failure(decoder.manager.pull_cache, key, dst, 3) == GONE
    decoder.manager.pull_cache(src.row(0), dst, 3)
    dst.expect_rows(src, [(0, 3)])
    cluster.check()


def test_deallocated_memory_lives_until_its_last_key_is_pulled(cluster: Cluster, ends: Ends) -> None:
    prompt, decoder = ends
    whole_pool = {"tensors": 2, "rows": 2, "row_bytes": POOL_BYTES // 4}
    keys = [CacheKey(1, 7), CacheKey(1, 8)]
    src, dst = prompt.allocate("src", keys=keys, **whole_pool), decoder.register("dst", **whole_pool)
    prompt.manager.deallocate_cache(src)
    assert failure(decoder.manager.pull_cache, src.row(0), dst) == GONE  # its id is given up
    for row, key in enumerate(keys):
        assert failure(prompt.allocate, "next", **whole_pool) == LLMStatusCode.LLM_OUT_OF_MEMORY
        decoder.manager.pull_cache(key, dst, 1 - row)
        dst.expect_rows(src, [(row, 1 - row)])
    del prompt.caches["src"]
    prompt.allocate("next", keys=keys, **whole_pool)  # the memory and the keys are free again
    cluster.check()


def test_a_removed_key_frees_as_a_pulled_one_does(cluster: Cluster, ends: Ends) -> None:
    prompt, decoder = ends
    keys = [CacheKey(1, 7), CacheKey(1, NONE, 0, 8)]
    src = prompt.allocate("src", keys=keys, tensors=1, rows=2, row_bytes=POOL_BYTES // 2)
    dst = decoder.register("dst", tensors=1, rows=2, row_bytes=POOL_BYTES // 2)
    prompt.manager.deallocate_cache(src)
    del prompt.caches["src"]
    for key in keys:
        prompt.manager.remove_cache_key(key)
        prompt.manager.remove_cache_key(key)  # a second time is nothing
        assert failure(decoder.manager.pull_cache, key, dst) == GONE
    prompt.allocate("next", tensors=1, rows=1, row_bytes=POOL_BYTES)
    cluster.check()


@pytest.mark.parametrize(("src_placement", "dst_placement"), list(product(["HOST", "DEVICE"], repeat=2)))
@pytest.mark.parametrize("made", ["register", "allocate"])
def test_every_pair_of_placements(
    cluster: Cluster, ends: Ends, made: str, src_placement: str, dst_placement: str
) -> None:
    prompt, decoder = getattr(ends[0], made), getattr(ends[1], made)
    key = CacheKey(1, 7)
    src, dst = (
        prompt("src", keys=[key], placement=src_placement, **SHAPE),
        decoder("dst", placement=dst_placement, **SHAPE),
    )
    src_blocks = prompt("src blocks", placement=src_placement, **BLOCKS)
    dst_blocks = decoder("dst blocks", placement=dst_placement, **BLOCKS)
    manager = ends[1].manager
    manager.pull_cache(src.row(3), dst, 1)
    dst.expect_rows(src, [(3, 1)])
    manager.pull_blocks(src_blocks.blocks_key, dst_blocks, [0, 1], [2, 3])
    dst_blocks.expect_rows(src_blocks, [(0, 2), (1, 3)])
    manager.pull_blocks(key, dst_blocks, [], [1])
    dst_blocks.expect_pieces(src, 0, [1])
    cluster.check()


def test_rows_of_another_length(cluster: Cluster, ends: Ends) -> None:
    """Each end has its own stride, and no size may leave the row of either."""
    prompt, decoder = ends
    src = prompt.register("src", **SHAPE)
    shorter = decoder.register("shorter", **{**SHAPE, "row_bytes": 24})
    longer = decoder.register("longer", **{**SHAPE, "row_bytes": 56})
    pull = decoder.manager.pull_cache
    pull(src.row(1), shorter, 2)
    shorter.expect_rows(src, [(1, 2)], size=24)
    pull(src.row(2), longer, 3, 40)
    longer.expect_rows(src, [(2, 3)], size=40)
    for dst, size in ((shorter, 25), (longer, 41), (longer, -1)):
        assert failure(pull, src.row(1), dst, 0, size) == LLMStatusCode.LLM_PARAM_INVALID
    cluster.check()


def test_blocks_are_not_pulled_into_rows(cluster: Cluster, ends: Ends) -> None:
    prompt, decoder = ends
    src, dst = prompt.allocate("src", **BLOCKS), decoder.register("dst", **SHAPE)
    assert failure(decoder.manager.pull_cache, src.row(0), dst) == LLMStatusCode.LLM_PARAM_INVALID
    blocks = decoder.register("blocks", **BLOCKS)
    assert failure(decoder.manager.pull_blocks, src.row(0), blocks, [], [0]) == LLMStatusCode.LLM_PARAM_INVALID
    assert failure(decoder.manager.pull_blocks, src.blocks_key, dst, [0], [0]) == LLMStatusCode.LLM_PARAM_INVALID
    rows = prompt.allocate("rows", keys=[CacheKey(1, 7)], **SHAPE)
    unknown = BlocksCacheKey(1, rows.spec.seed)
    assert failure(decoder.manager.pull_blocks, unknown, blocks, [0], [0]) == GONE
    cluster.check()


def test_pushes_are_of_the_other_mode(cluster: Cluster, ends: Ends) -> None:
    prompt, decoder = ends
    src, dst = prompt.register("src", **SHAPE), decoder.register("dst", **SHAPE)
    src_blocks, dst_blocks = prompt.register("src blocks", **BLOCKS), decoder.register("dst blocks", **BLOCKS)
    assert failure(prompt.manager.push_cache, dst.row(0), src) == LLMStatusCode.LLM_PARAM_INVALID
    push = prompt.manager.push_blocks
    assert failure(push, dst_blocks.blocks_key, src_blocks, [0], [0]) == LLMStatusCode.LLM_PARAM_INVALID
    cluster.check()


def test_the_server_pulls_from_its_client(cluster: Cluster, ends: Ends) -> None:
    prompt, decoder = ends
    key = CacheKey(2, 9)
    src, dst = decoder.allocate("src", keys=[key], **SHAPE), prompt.register("dst", **SHAPE)
    prompt.manager.pull_cache(key, dst, 2)
    dst.expect_rows(src, [(0, 2)])
    assert failure(prompt.manager.pull_cache, key, dst) == GONE
    cluster.check()


def test_a_key_that_is_allocated_after_the_link_is_found(cluster: Cluster, ends: Ends) -> None:
    """Request after request over one link, which is what the mode is for; the pool has room for three at a time."""
    prompt, decoder = ends
    dst = decoder.register("dst", **SHAPE)
    for request in range(20):
        key = CacheKey(1, request)
        src = prompt.allocate("src", keys=[key], **SHAPE, seed=request)
        prompt.manager.deallocate_cache(src)
        decoder.manager.pull_cache(key, dst, request % 4)
        dst.expect_rows(src, [(0, request % 4)])
        del prompt.caches["src"]
    cluster.check()
