"""copy_cache, copy_blocks and swap_blocks against an oracle, with canaries around every tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from support.arenas import OURS, Arena, managed, move_rows

from vllm_datadist_connector.llm_datadist.status import LLMException, LLMStatusCode
from vllm_datadist_connector.llm_datadist.v2.cache_manager import CacheManager
from vllm_datadist_connector.llm_datadist.v2.llm_types import Cache, Placement

TENSORS, ROWS, ROW_BYTES = 4, 5, 24
EVERY = [(tensor, tensor) for tensor in range(TENSORS)]
INVALID = LLMStatusCode.LLM_PARAM_INVALID
GONE = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST


def arena(seed: int, row_bytes: int = ROW_BYTES, tensors: int = TENSORS) -> Arena:
    return Arena(seed, tensors, ROWS, row_bytes)


def failure(call: Callable[[], object]) -> LLMStatusCode:
    with pytest.raises(LLMException) as caught:
        call()
    return caught.value.status_code


@pytest.fixture
def caches() -> Iterator[CacheManager]:
    with managed({}) as engine:
        yield CacheManager(engine, OURS, remote_accessible=False, pools=frozenset())


@pytest.mark.parametrize(
    ("dst_row", "src_row", "offset", "size"), [(0, 0, 0, -1), (4, 2, 0, 24), (1, 3, 7, -1), (2, 0, 23, 1), (3, 4, 5, 6)]
)
def test_copy_cache(caches: CacheManager, dst_row: int, src_row: int, offset: int, size: int) -> None:
    src, dst = arena(1), arena(2)
    src_cache = caches.register_cache(src.desc(), src.addrs)
    dst_cache = caches.register_cache(dst.desc(Placement.HOST), dst.addrs)
    expected = dst.copy()
    end = ROW_BYTES if size == -1 else offset + size
    for tensor in range(TENSORS):
        expected[tensor][dst_row, offset:end] = src[tensor][src_row, offset:end]
    caches.copy_cache(dst_cache, src_cache, dst_row, src_row, offset, size)
    assert dst == expected
    assert src == arena(1)


def test_copy_cache_into_longer_rows(caches: CacheManager) -> None:
    src, dst = arena(1), arena(2, row_bytes=40)
    src_cache = caches.register_cache(src.desc(), src.addrs)
    dst_cache = caches.register_cache(dst.desc(), dst.addrs)
    expected = dst.copy()
    for tensor in range(TENSORS):
        expected[tensor][3, 4:24] = src[tensor][1, 4:24]
    caches.copy_cache(dst_cache, src_cache, 3, 1, 4)
    assert dst == expected
    assert failure(lambda: caches.copy_cache(src_cache, dst_cache)) == INVALID, "the rest of the row is too long"
    assert src == arena(1)


def test_copy_cache_refuses(caches: CacheManager) -> None:
    src, dst, few = arena(1), arena(2), arena(3, tensors=2)
    src_cache = caches.register_cache(src.desc(), src.addrs)
    dst_cache = caches.register_cache(dst.desc(), dst.addrs)
    few_cache = caches.register_cache(few.desc(), few.addrs)
    unknown = Cache(99, dst.desc(), dst.addrs, is_blocks_cache=False)
    calls = [
        (lambda: caches.copy_cache(dst_cache, unknown), GONE),
        (lambda: caches.copy_cache(unknown, src_cache), GONE),
        (lambda: caches.copy_cache(few_cache, src_cache), INVALID),
        (lambda: caches.copy_cache(dst_cache, src_cache, ROWS), INVALID),
        (lambda: caches.copy_cache(dst_cache, src_cache, 0, ROWS), INVALID),
        (lambda: caches.copy_cache(dst_cache, src_cache, 0, 0, ROW_BYTES), INVALID),
        (lambda: caches.copy_cache(dst_cache, src_cache, 0, 0, 2**64 - 1), INVALID),
        (lambda: caches.copy_cache(dst_cache, src_cache, 0, 0, 1, ROW_BYTES), INVALID),
        (lambda: caches.copy_cache(dst_cache, src_cache, 0, 0, 0, 2**63 - 1), INVALID),
    ]
    for index, (call, status) in enumerate(calls):
        assert failure(call) == status, index
    assert (src, dst, few) == (arena(1), arena(2), arena(3, tensors=2))


def test_copy_blocks_in_order(caches: CacheManager) -> None:
    memory = arena(1)
    cache = caches.register_blocks_cache(memory.desc(), memory.addrs)
    expected = memory.copy()
    caches.copy_blocks(cache, {0: [1, 2], 1: [4], 2: [2], 3: []})
    move_rows(expected, expected, EVERY, [(0, 1), (0, 2), (1, 4), (2, 2)])
    assert memory == expected
    assert memory[0][4].tolist() == arena(1)[0][0].tolist(), "block 1 had been overwritten before it was copied"


def test_copy_blocks_refuses(caches: CacheManager) -> None:
    memory = arena(1)
    cache = caches.register_blocks_cache(memory.desc(), memory.addrs)
    for blocks in ({}, {0: []}, {ROWS: [0]}, {0: [ROWS]}, {0: [-1]}, {2**70: [0]}):
        assert failure(lambda blocks=blocks: caches.copy_blocks(cache, blocks)) == INVALID
    caches.unregister_cache(cache.cache_id)
    assert failure(lambda: caches.copy_blocks(cache, {0: [1]})) == GONE
    assert memory == arena(1)


@pytest.mark.parametrize("out", [True, False])
@pytest.mark.parametrize("registered", [True, False])
def test_swap_blocks_is_one_way(caches: CacheManager, out: bool, registered: bool) -> None:
    device, host = arena(1), arena(2)
    device_cache = caches.register_blocks_cache(device.desc(), device.addrs)
    if registered:
        host_cache = caches.register_blocks_cache(host.desc(Placement.HOST), host.addrs)
    else:
        host_cache = Cache.create_cpu_cache(host.desc(Placement.HOST), host.addrs)
    src, dst = (device, host) if out else (host, device)
    expected, before = dst.copy(), src.copy()
    blocks = {0: 2, 1: 3, 2: 4, 4: 0}
    caches.swap_blocks(*((device_cache, host_cache) if out else (host_cache, device_cache)), blocks)
    move_rows(src, expected, EVERY, list(blocks.items()))
    assert dst == expected
    assert src == before


def test_swap_blocks_refuses(caches: CacheManager) -> None:
    device, host = arena(1), arena(2)
    device_cache = caches.register_blocks_cache(device.desc(), device.addrs)
    host_cache = Cache.create_cpu_cache(host.desc(Placement.HOST), host.addrs)
    for blocks in ({ROWS: 0}, {0: ROWS}, {-1: 0}):
        assert failure(lambda blocks=blocks: caches.swap_blocks(device_cache, host_cache, blocks)) == INVALID
    caches.unregister_cache(device_cache.cache_id)
    assert failure(lambda: caches.swap_blocks(device_cache, host_cache, {0: 1})) == GONE
    assert (device, host) == (arena(1), arena(2))
