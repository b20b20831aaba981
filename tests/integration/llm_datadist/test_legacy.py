"""The legacy KvCacheManager between a prompt's and a decoder's node: what is pulled and pushed, and how long keys live.

Byte for byte, by every transport.
"""

from __future__ import annotations

import pytest
from support.datadist_cluster import Cluster, failure
from support.datadist_peer import Gate
from support.legacy_ends import (
    BLOCKS,
    DECODER,
    POOL_BYTES,
    PROMPT,
    SHAPE,
    TWO_DEVICES,
    Ends,
    await_empty,
    deallocate,
    is_empty,
    of_layer,
    open_ends,
    transfer,
)

from vllm_datadist_connector.llm_datadist import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    LLMStatusCode,
    TransferConfig,
)

NONE = 2**64 - 1
GONE = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
INVALID = LLMStatusCode.LLM_PARAM_INVALID
OK = LLMStatusCode.LLM_SUCCESS


@pytest.fixture
def ends(cluster: Cluster) -> Ends:
    prompt, decoder = open_ends(cluster)
    decoder.link(prompt)
    return prompt, decoder


@pytest.fixture
def two_devices(cluster: Cluster) -> Ends:
    prompt, decoder = open_ends(cluster, device_id=[0, 1])
    decoder.link(prompt)
    return prompt, decoder


# ---- pulls and the ends of keys ----


def test_a_cache_lives_until_its_keys_are_pulled(cluster: Cluster, ends: Ends) -> None:
    prompt, decoder = ends
    keys = [CacheKey(PROMPT, 1), CacheKey(PROMPT, NONE), CacheKey(PROMPT, 2, 9)]
    src, dst = prompt.allocate("src", keys=keys, **SHAPE), decoder.allocate("dst", **SHAPE)
    deallocate(src)
    pull = decoder.manager.pull_cache
    for row, (key, src_row) in enumerate([(keys[2], 2), (keys[0], 0)]):
        assert not is_empty(prompt)
        pull(key, dst, row)
        dst.expect_rows(src, [(src_row, row)])
        assert failure(pull, key, dst, 3) == GONE
    await_empty(prompt)
    assert failure(pull, CacheKeyByIdAndIndex(PROMPT, src.cache_id), dst) == GONE
    cluster.check()


def test_a_prefix_key_stays_until_it_is_removed(cluster: Cluster, ends: Ends) -> None:
    prompt, decoder = ends
    request, prefix = CacheKey(PROMPT, 5), CacheKey(PROMPT, NONE, 0, 6)
    src, dst = prompt.allocate("src", keys=[request, prefix], **SHAPE), decoder.allocate("dst", **SHAPE)
    deallocate(src)
    for row in range(2):
        decoder.manager.pull_cache(prefix, dst, row)
        dst.expect_rows(src, [(1, row)])
    for key in (request, prefix, prefix, CacheKey(PROMPT, 77)):
        prompt.manager.remove_cache_key(key)
    for key in (request, prefix):
        assert failure(decoder.manager.pull_cache, key, dst) == GONE
    await_empty(prompt)
    cluster.check()


def test_a_second_deallocation_and_keys_that_are_taken(cluster: Cluster, ends: Ends) -> None:
    prompt, decoder = ends
    src, dst = prompt.allocate("src", keys=[CacheKey(PROMPT, 1)], **SHAPE), decoder.allocate("dst", **SHAPE)
    for keys in ([CacheKey(PROMPT, 1)], [CacheKey(PROMPT, 2)] * 2, [CacheKey(PROMPT, id_) for id_ in range(3, 8)]):
        assert failure(prompt.allocate, "other", keys=keys, **SHAPE) == INVALID
    deallocate(src)
    prompt.manager.deallocate_cache(src)  # does not take the key's part
    decoder.manager.pull_cache(CacheKey(PROMPT, 1), dst)
    dst.expect_rows(src, [(0, 0)])
    cluster.check()


@pytest.mark.parametrize(
    ("size", "src_offset", "dst_offset", "length"),
    [(16, 4, 8, 16), (-1, 0, 8, 32), (-1, 8, 8, 32), (1, 39, 0, 1), (40, 0, 0, 40)],
)
def test_part_of_a_row_to_another_place_in_it(
    cluster: Cluster, ends: Ends, size: int, src_offset: int, dst_offset: int, length: int
) -> None:
    prompt, decoder = ends
    src = prompt.allocate("src", keys=[CacheKey(PROMPT, NONE), CacheKey(PROMPT, 1)], **SHAPE)
    dst = decoder.allocate("dst", **SHAPE)
    offsets = {"src_cache_offset": src_offset, "dst_cache_offset": dst_offset}
    decoder.manager.pull_cache(CacheKey(PROMPT, 1), dst, 3, size, **offsets)
    for tensor in range(SHAPE["tensors"]):
        moved = src.expected[tensor][1, src_offset : src_offset + length]
        dst.expected[tensor][3, dst_offset : dst_offset + length] = moved
    cluster.check()


def test_what_is_out_of_range_moves_nothing_and_consumes_nothing(cluster: Cluster, ends: Ends) -> None:
    prompt, decoder = ends
    key = CacheKey(PROMPT, 1)
    src, dst = prompt.allocate("src", keys=[key], **SHAPE), decoder.allocate("dst", **SHAPE)
    pull = decoder.manager.pull_cache
    for arguments, keywords in (
        ((4,), {}),
        ((0, 41), {}),
        ((0, 40), {"src_cache_offset": 1}),
        ((0, 40), {"dst_cache_offset": 1}),
        ((0, -1), {"src_cache_offset": 1}),
        ((0, -1), {"dst_cache_offset": 40}),
        ((0, -1), {"src_layer_range": range(2, 3), "dst_layer_range": range(1)}),
        ((0, -1), {"src_layer_range": range(1), "dst_layer_range": range(2, 3)}),
    ):
        assert failure(pull, key, dst, *arguments, **keywords) == INVALID, (arguments, keywords)
    with pytest.raises(ValueError, match="src_cache_offset"):
        pull(key, dst, src_cache_offset=-1)
    cluster.check()
    pull(key, dst, 1)
    dst.expect_rows(src, [(0, 1)])
    cluster.check()


def test_layers_one_after_the_other_consume_the_key_together(cluster: Cluster, ends: Ends) -> None:
    prompt, decoder = ends
    key = CacheKey(PROMPT, 1)
    src, dst = prompt.allocate("src", keys=[key], **SHAPE), decoder.allocate("dst", **SHAPE)
    deallocate(src)
    for src_layer, dst_layer in ((1, 0), (1, 1), (0, 0)):
        assert not is_empty(prompt)
        layers = {
            "src_layer_range": range(src_layer, src_layer + 1),
            "dst_layer_range": range(dst_layer, dst_layer + 1),
        }
        decoder.manager.pull_cache(key, dst, 2, **layers)
        dst.expect_rows(src, [(0, 2)], [(2 * src_layer + k, 2 * dst_layer + k) for k in range(2)])
    await_empty(prompt)
    cluster.check()


def test_blocks_in_list_order(cluster: Cluster, ends: Ends) -> None:
    prompt, decoder = ends
    src, dst = prompt.allocate("src", **BLOCKS), decoder.allocate("dst", keys=(), **BLOCKS)
    pull = decoder.manager.pull_blocks
    for pairs in ([(0, 1), (1, 2), (3, 3)], [(2, 0), (1, 0)], [(3, 3), (2, 2)]):
        pull(src.blocks_key, dst, [s for s, _ in pairs], [d for _, d in pairs])
        dst.expect_rows(src, pairs)
    pull(src.blocks_key, dst, [0], [0], src_layer_range=range(1, 2), dst_layer_range=range(1))
    dst.expect_rows(src, [(0, 0)], [(2, 0), (3, 1)])
    for blocks in ([4], [0]), ([0], [4]), ([0, 1], [0]):
        assert failure(pull, src.blocks_key, dst, *blocks) == INVALID
    assert failure(pull, BlocksCacheKey(PROMPT, src.spec.seed + 1), dst, [0], [0]) == GONE
    deallocate(src)
    assert failure(pull, src.blocks_key, dst, [0], [0]) == GONE
    await_empty(prompt)
    cluster.check()


def test_a_full_pool_has_the_code_that_programs_wait_for(cluster: Cluster, ends: Ends) -> None:
    prompt, _ = ends
    whole = prompt.allocate("whole", tensors=16, rows=1, row_bytes=POOL_BYTES // 16)
    full = LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY
    assert failure(prompt.allocate, "more", **SHAPE) == full
    assert failure(prompt.allocate, "more blocks", **BLOCKS) == full
    deallocate(whole)
    prompt.allocate("more", **SHAPE)
    cluster.check()


def test_both_ends_may_have_the_same_cluster_id(cluster: Cluster) -> None:
    """Published programs give the prompt's keys and both ends one id."""
    prompt, decoder = open_ends(cluster, decoder_id=PROMPT)
    decoder.link(prompt)
    src, dst = prompt.allocate("src", keys=[CacheKey(PROMPT, 1)], **SHAPE), decoder.allocate("dst", **SHAPE)
    decoder.manager.pull_cache(CacheKey(PROMPT, 1), dst, 2)
    dst.expect_rows(src, [(0, 2)])
    again = prompt.allocate("again", **SHAPE)
    assert transfer(prompt, again, [TransferConfig(PROMPT, dst.addrs[:2], range(1, 2), 3)]) == [OK]
    dst.expect_rows(again, [(3, 0)], [(2, 0), (3, 1)])
    assert decoder.datadist.unlink_clusters([prompt.info()]) == (OK, [OK])
    assert failure(decoder.manager.pull_cache, CacheKey(PROMPT, 2), dst) == INVALID  # our own id, and nobody else's
    cluster.check()


# ---- several devices ----


def test_pulls_of_two_devices(cluster: Cluster, two_devices: Ends) -> None:
    prompt, decoder = two_devices
    keys = [CacheKey(PROMPT, id_) for id_ in range(3)]
    src, dst = prompt.allocate("src", keys=keys, **TWO_DEVICES), decoder.allocate("dst", **TWO_DEVICES)
    deallocate(src)
    pull = decoder.manager.pull_cache
    pull(keys[2], dst, 0)
    dst.expect_rows(src, [(2, 0)])
    pull(keys[1], dst, 1, src_layer_range=range(1, 2), dst_layer_range=range(1))
    dst.expect_rows(src, [(1, 1)], of_layer(1, 0))
    pull(keys[1], dst, 2, src_layer_range=range(1), dst_layer_range=range(1, 2))
    dst.expect_rows(src, [(1, 2)], of_layer(0, 1))
    assert failure(pull, keys[1], dst) == GONE
    assert failure(pull, keys[0], dst, src_layer_range=range(2, 3), dst_layer_range=range(1)) == INVALID
    assert failure(pull, keys[0], dst, src_layer_range=range(1), dst_layer_range=range(2, 3)) == INVALID
    pull(keys[0], dst, 3)
    dst.expect_rows(src, [(0, 3)])
    await_empty(prompt, devices=2)
    cluster.check()


def test_layers_to_the_addresses_of_two_devices(cluster: Cluster, two_devices: Ends) -> None:
    prompt, decoder = two_devices
    src, dst = prompt.allocate("src", **TWO_DEVICES), decoder.allocate("dst", **TWO_DEVICES)
    row = 40
    addrs = [dst.addrs[dst_tensor] + 2 * row for _, dst_tensor in of_layer(1, 0)]
    transfer(prompt, src, [TransferConfig(DECODER, addrs, range(1, 2), 3)])
    dst.expect_rows(src, [(3, 2)], of_layer(1, 0))
    cluster.check()


# ---- layer by layer ----


def test_layers_to_addresses(cluster: Cluster, ends: Ends) -> None:
    prompt, decoder = ends
    src, dst = prompt.allocate("src", **SHAPE), decoder.allocate("dst", **SHAPE)
    assert transfer(prompt, src, [TransferConfig(DECODER, [dst.addrs[0], dst.addrs[1] + 80], range(1, 2), 3)]) == [OK]
    dst.expect_rows(src, [(3, 0)], [(2, 0)])
    dst.expect_rows(src, [(3, 2)], [(3, 1)])
    outside = [dst.addrs[2], dst.addrs[3] + 4 * 40 - 39]  # one byte less than a row is left
    assert transfer(prompt, src, [TransferConfig(DECODER, outside, range(1))]) == [INVALID]
    cluster.check()


def test_blocks_and_rows_to_blocks_at_addresses(cluster: Cluster, ends: Ends) -> None:
    prompt, decoder = ends
    src, rows = prompt.allocate("src", **BLOCKS), prompt.allocate("rows", **SHAPE)
    dst = decoder.allocate("dst", keys=(), **{**BLOCKS, "rows": 8})
    config = TransferConfig(DECODER, dst.addrs)
    assert transfer(prompt, src, [config], [3, 0, 1], [1, 7, 2]) == [OK]
    dst.expect_rows(src, [(3, 1), (0, 7), (1, 2)])
    in_pieces = TransferConfig(DECODER, dst.addrs, None, 2)
    assert transfer(prompt, rows, [in_pieces], None, [9, 4, 3], 16) == [OK]  # of 16, 16 and 8 bytes
    for tensor in range(4):
        flat, row = dst.expected[tensor].reshape(-1), rows.expected[tensor][2]
        for piece, block in enumerate([9, 4, 3]):
            moved = row[16 * piece : 16 * piece + 16]
            flat[16 * block : 16 * block + len(moved)] = moved
    cluster.check()


def test_an_unfinished_task_waits_in_the_legacy_code(cluster: Cluster, ends: Ends) -> None:
    prompt, decoder = ends
    src, dst = prompt.allocate("src", **SHAPE), decoder.allocate("dst", **SHAPE)
    gate = Gate(prompt, 1)
    task = prompt.object(prompt.manager.transfer_cache_async(src, gate, [TransferConfig(DECODER, dst.addrs)]))
    waiting = LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT
    assert task.synchronize(0) == waiting
    assert task.get_results(0) == [waiting]
    gate.open_until(2)
    assert task.synchronize(60_000) == OK
    dst.expect_rows(src, [(0, 0)])
    cluster.check()
