"""Registrations of the same memory do not depend on one another, nor transfers on huge pages that come meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from support.endpoints import UINT8, Endpoint, Memory, check, copy_blocks
from support.huge_pages import huge_bytes, in_small_pages, needs_huge_pages

from vllm_datadist_connector import _native

SRC, DST = [1, 2, 9], [3, 4, 0]


def test_memory_registered_twice_is_served_until_the_last_is_unregistered(
    transport: str, make_endpoint: Callable[..., Endpoint]
) -> None:
    options = {"datadist.Transport": transport}
    owner, reader = make_endpoint(cluster_id=1, options=options), make_endpoint(cluster_id=2, options=options)
    addresses = [tensor.ctypes.data for tensor in owner.memory]
    status, second = owner.datadist.register_kv_cache(owner.memory.shape[1:], UINT8, addresses)
    check(status)
    reader.link(owner)
    expected = reader.read_memory()
    copy_blocks(owner.memory, expected, SRC, DST)

    check(owner.datadist.unregister_kv_cache(owner.cache_id))
    check(reader.datadist.pull_kv_blocks(owner.cluster_id, second, reader.cache_id, SRC, DST))
    assert (reader.memory == expected).all()
    assert reader.pull(owner, SRC, DST) == _native.LLM_KV_CACHE_NOT_EXIST

    check(owner.datadist.unregister_kv_cache(second))
    gone = reader.datadist.pull_kv_blocks(owner.cluster_id, second, reader.cache_id, SRC, DST)
    assert gone == _native.LLM_KV_CACHE_NOT_EXIST


@pytest.mark.parametrize(("src_parts", "dst_parts"), [(1, 4), (4, 1), (4, 4), (2, 8)])
def test_one_memory_in_blocks_of_several_sizes(
    transport: str, make_endpoint: Callable[..., Endpoint], src_parts: int, dst_parts: int
) -> None:
    """What connectors of unlike block sizes do: each addresses its memory in blocks of the size that both can."""
    block_bytes, options = 1024, {"datadist.Transport": transport}
    owner = make_endpoint(cluster_id=1, blocks=8 * src_parts, block_bytes=block_bytes // src_parts, options=options)
    reader = make_endpoint(cluster_id=2, blocks=8 * dst_parts, block_bytes=block_bytes // dst_parts, options=options)
    granule = block_bytes // max(src_parts, dst_parts)
    views = []
    for end in (owner, reader):
        shape = [8 * block_bytes // granule, granule]
        status, view = end.datadist.register_kv_cache(shape, UINT8, [tensor.ctypes.data for tensor in end.memory])
        check(status)
        views.append(view)
    reader.link(owner)
    source, expected = (end.read_memory().reshape(len(end.memory), -1, granule) for end in (owner, reader))
    src, dst = [1, 2, 9, 13], [15, 0, 7, 6]
    copy_blocks(source, expected, src, dst)
    check(reader.datadist.pull_kv_blocks(owner.cluster_id, views[0], views[1], src, dst))
    np.testing.assert_array_equal(reader.memory.reshape(expected.shape), expected)


@needs_huge_pages
def test_pulls_while_memory_moves_into_huge_pages(transport: str, make_endpoint: Callable[..., Endpoint]) -> None:
    """Both ends' pages are collapsed under the pulls; each pull takes what its source holds, and nothing else moves."""
    options = {"datadist.Transport": transport, "datadist.HugePages": "1"}
    owner, reader = (make_endpoint(cluster_id=i, blocks=1, block_bytes=8, options=options) for i in (1, 2))
    reader.link(owner)
    blocks, block_bytes = 256, 64 << 10
    random = np.random.default_rng(3)
    source, target = (
        in_small_pages(random.integers(0, 256, (4, blocks, block_bytes), dtype=np.uint8)) for _ in range(2)
    )
    expected = target.copy()

    def register(end: Endpoint, memory: Memory) -> int:
        status, cache_id = end.datadist.register_kv_cache(
            memory.shape[1:], UINT8, [tensor.ctypes.data for tensor in memory]
        )
        check(status)
        return cache_id

    src_id, dst_id = register(owner, source), register(reader, target)
    waiters = [threading.Thread(target=end.datadist.wait_for_huge_pages) for end in (owner, reader)]
    for waiter in waiters:
        waiter.start()
    pulls = beside = 0
    while any(waiter.is_alive() for waiter in waiters) or not pulls:
        src, dst = (random.permutation(blocks)[:64].tolist() for _ in range(2))
        source[:, src[0]] += 1  # the owner goes on writing between pulls
        copy_blocks(source, expected, src, dst)
        check(reader.datadist.pull_kv_blocks(owner.cluster_id, src_id, dst_id, src, dst))
        pulls += 1
        beside += any(waiter.is_alive() for waiter in waiters)
    np.testing.assert_array_equal(target, expected)
    assert beside > 0, "the memory had moved before the first pull"
    assert huge_bytes(source.ctypes.data, source.nbytes) > 0
    for end, cache_id in ((owner, src_id), (reader, dst_id)):
        check(end.datadist.unregister_kv_cache(cache_id))  # the memory goes before the endpoints do
