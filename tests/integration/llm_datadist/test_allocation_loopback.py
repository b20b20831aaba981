"""Allocated caches: how long their memory lives, and which pulls use a key up. Observed by a loopback peer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
from support.arenas import OURS, PEER, Arena, link_with_itself, managed, view

from vllm_datadist_connector import _native
from vllm_datadist_connector.llm_datadist.data_type import DataType
from vllm_datadist_connector.llm_datadist.status import LLMException, LLMStatusCode
from vllm_datadist_connector.llm_datadist.v2.cache_manager import CacheManager
from vllm_datadist_connector.llm_datadist.v2.llm_types import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    Placement,
)

NONE = 2**64 - 1
TENSORS, ROWS, ROW_BYTES = 4, 4, 1024
POOL_BYTES = 1 << 20
POOL = json.dumps({"memory_size": POOL_BYTES, "page_shift": 12})
DESC = CacheDesc(TENSORS, [ROWS, ROW_BYTES], DataType.DT_UINT8)
WHOLE_POOL = CacheDesc(16, [POOL_BYTES // 16], DataType.DT_UINT8)
GONE = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST


class World:
    """A manager with a device pool, linked with itself, and a row of local memory to pull into."""

    def __init__(self, engine: _native.ManagedDataDist, remote_accessible: bool, placement: Placement) -> None:
        self.caches = CacheManager(engine, OURS, remote_accessible=remote_accessible, pools=frozenset({placement}))
        self.placement = placement
        self.local = Arena(1, TENSORS, ROWS, ROW_BYTES)
        self.into = self.caches.register_cache(self.local.desc(), self.local.addrs)
        link_with_itself(engine)

    def desc(self, like: CacheDesc = DESC) -> CacheDesc:
        return CacheDesc(like.num_tensors, like.shape, like.data_type, self.placement)

    def allocate(self, *keys: CacheKey) -> tuple[Cache, Arena]:
        """A cache and what it holds."""
        cache = self.caches.allocate_cache(self.desc(), keys)
        content = Arena(cache.cache_id, TENSORS, ROWS, ROW_BYTES)
        for tensor, memory in enumerate(view(cache.tensor_addrs, ROWS, ROW_BYTES)):
            memory[:] = content[tensor]
        return cache, content

    def pull(self, key: CacheKey | CacheKeyByIdAndIndex, content: Arena, row: int, **layers: range) -> None:
        """Pulls, and compares what came with row `row` of `content`."""
        before = self.local.copy()
        self.caches.pull_cache(key, self.into, 1, **layers)
        selected = layers.get("src_layer_range", range(TENSORS // 2))
        for src, dst in zip(selected, layers.get("dst_layer_range", selected), strict=True):
            for k in range(2):
                before[2 * dst + k][1] = content[2 * src + k][row]
        assert self.local == before

    def pull_fails(self, key: CacheKey | CacheKeyByIdAndIndex) -> None:
        assert failure(lambda: self.caches.pull_cache(key, self.into)) == GONE

    @property
    def is_empty(self) -> bool:
        """Whether nothing of the pool is in use: only then is there room for a cache that is as large."""
        try:
            cache = self.caches.allocate_cache(self.desc(WHOLE_POOL))
        except LLMException as error:
            if error.status_code != LLMStatusCode.LLM_OUT_OF_MEMORY:
                raise
            return False
        self.caches.deallocate_cache(cache)
        return True


def failure(call: Callable[[], object]) -> LLMStatusCode:
    with pytest.raises(LLMException) as caught:
        call()
    return caught.value.status_code


@pytest.fixture(params=[Placement.DEVICE, Placement.HOST], ids=["device", "host"])
def two_sided(request: pytest.FixtureRequest, transport: str) -> Iterator[World]:
    pool = "llm.MemPoolConfig" if request.param == Placement.DEVICE else "llm.HostMemPoolConfig"
    with managed({"datadist.Transport": transport, pool: POOL}) as engine:
        yield World(engine, False, request.param)


@pytest.fixture
def remote(transport: str) -> Iterator[World]:
    options = {"datadist.Transport": transport, "llm.EnableRemoteCacheAccessible": "1", "llm.MemPoolConfig": POOL}
    with managed(options) as engine:
        yield World(engine, True, Placement.DEVICE)


def key(req_id: int, model_id: int = 0) -> CacheKey:
    return CacheKey(PEER, req_id, model_id)


def prefix(prefix_id: int) -> CacheKey:
    return CacheKey(PEER, NONE, 0, prefix_id)


def test_memory_goes_when_the_id_and_every_key_are_gone(two_sided: World) -> None:
    assert two_sided.is_empty
    cache, content = two_sided.allocate(key(1), key(NONE), key(3), prefix(4))
    by_id = CacheKeyByIdAndIndex(PEER, cache.cache_id, 1)
    two_sided.pull(by_id, content, 1)
    two_sided.caches.deallocate_cache(cache)
    assert cache.tensor_addrs == []
    two_sided.caches.deallocate_cache(cache)
    two_sided.pull_fails(by_id)
    two_sided.pull(key(1), content, 0)
    two_sided.pull_fails(key(1))
    two_sided.caches.remove_cache_key(key(3))
    two_sided.caches.remove_cache_key(key(3))
    two_sided.pull_fails(key(3))
    for _ in range(3):
        two_sided.pull(prefix(4), content, 3)
    assert not two_sided.is_empty
    two_sided.caches.remove_cache_key(prefix(4))
    two_sided.pull_fails(prefix(4))
    assert two_sided.is_empty


def test_the_id_may_go_last(two_sided: World) -> None:
    cache, content = two_sided.allocate(key(1))
    two_sided.pull(key(1), content, 0)
    assert not two_sided.is_empty
    two_sided.pull(CacheKeyByIdAndIndex(PEER, cache.cache_id, 2), content, 2)
    two_sided.caches.deallocate_cache(cache)
    assert two_sided.is_empty


def test_a_key_is_used_up_once_every_layer_was_pulled_by_it(two_sided: World) -> None:
    cache, content = two_sided.allocate(key(1))
    two_sided.caches.deallocate_cache(cache)
    for _ in range(3):
        two_sided.pull(key(1), content, 0, src_layer_range=range(1), dst_layer_range=range(1, 2))
    assert not two_sided.is_empty
    two_sided.pull(key(1), content, 0, src_layer_range=range(1, 2), dst_layer_range=range(1))
    two_sided.pull_fails(key(1))
    assert two_sided.is_empty


def test_a_pull_that_fails_uses_nothing_up(two_sided: World) -> None:
    cache, content = two_sided.allocate(key(1))
    pull = two_sided.caches.pull_cache
    assert failure(lambda: pull(key(1), two_sided.into, 99)) == LLMStatusCode.LLM_PARAM_INVALID
    bad = {"src_layer_range": range(1), "dst_layer_range": range(2)}
    assert failure(lambda: pull(key(1), two_sided.into, **bad)) == LLMStatusCode.LLM_PARAM_INVALID
    two_sided.pull(key(1), content, 0)
    two_sided.pull_fails(key(1))
    two_sided.caches.deallocate_cache(cache)


def test_a_key_used_up_may_be_bound_again(two_sided: World) -> None:
    first, content = two_sided.allocate(key(1))
    two_sided.pull(key(1), content, 0)
    second, content = two_sided.allocate(key(2), key(1))
    two_sided.pull(key(1), content, 1)
    two_sided.caches.deallocate_cache(first)
    two_sided.caches.deallocate_cache(second)
    two_sided.caches.remove_cache_key(key(2))
    assert two_sided.is_empty


@pytest.mark.parametrize(
    "keys",
    [[key(1), key(1)], [prefix(1), prefix(1)], [key(7)], [key(i) for i in range(10, 15)]],
    ids=["twice", "prefix twice", "bound already", "more than rows"],
)
def test_keys_that_cannot_be_bound_leave_nothing_behind(two_sided: World, keys: list[CacheKey]) -> None:
    bound, content = two_sided.allocate(key(7))
    allocate = two_sided.caches.allocate_cache
    assert failure(lambda: allocate(two_sided.desc(), keys)) == LLMStatusCode.LLM_PARAM_INVALID
    two_sided.pull(key(7), content, 0)
    two_sided.caches.deallocate_cache(bound)
    assert two_sided.is_empty
    if len(set(map(repr, keys))) == len(keys) <= ROWS:
        again, _ = two_sided.allocate(*keys)
        two_sided.caches.deallocate_cache(again)


def test_models_do_not_share_keys(two_sided: World) -> None:
    _, first = two_sided.allocate(key(1, 1))
    _, second = two_sided.allocate(key(1, 2))
    two_sided.pull(key(1, 2), second, 0)
    two_sided.pull(key(1, 1), first, 0)
    two_sided.pull_fails(key(1, 2))


def test_blocks_caches_free_at_once_with_their_key(two_sided: World) -> None:
    caches = two_sided.caches
    cache = caches.allocate_blocks_cache(two_sided.desc(), BlocksCacheKey(OURS, 3))
    memory = view(cache.tensor_addrs, ROWS, ROW_BYTES)
    for tensor in memory:
        tensor[:] = 7
    local = Arena(2, TENSORS, ROWS, ROW_BYTES)
    into = caches.register_blocks_cache(local.desc(), local.addrs)
    expected = local.copy()
    for _ in range(2):  # a blocks key is not used up
        caches.pull_blocks(BlocksCacheKey(PEER, 3), into, [1, 3], [0, 2])
    for tensor in range(TENSORS):
        expected[tensor][0] = expected[tensor][2] = 7
    assert local == expected
    assert failure(lambda: caches.deallocate_cache(cache)) == LLMStatusCode.LLM_PARAM_INVALID
    caches.deallocate_blocks_cache(cache)
    assert cache.tensor_addrs == []
    assert failure(lambda: caches.pull_blocks(BlocksCacheKey(PEER, 3), into, [1], [0])) == GONE
    assert two_sided.is_empty


def test_an_exhausted_pool(two_sided: World) -> None:
    cache, content = two_sided.allocate(key(1))
    too_large = two_sided.desc(WHOLE_POOL)
    allocate = two_sided.caches.allocate_cache
    for _ in range(2):
        assert failure(lambda: allocate(too_large, [key(9)])) == LLMStatusCode.LLM_OUT_OF_MEMORY
    two_sided.pull_fails(key(9))
    two_sided.pull(key(1), content, 0)
    two_sided.caches.deallocate_cache(cache)
    assert two_sided.is_empty


def test_remote_accessible_pulls_use_nothing_up(remote: World) -> None:
    cache, content = remote.allocate(key(1), prefix(2))
    by_id = CacheKeyByIdAndIndex(PEER, cache.cache_id)
    arena = Arena(3, TENSORS, ROWS, ROW_BYTES)
    into = remote.caches.register_blocks_cache(arena.desc(), arena.addrs)
    for _ in range(3):
        remote.pull(by_id, content, 0)
        remote.caches.pull_blocks(key(1), into, dst_blocks=[2])
    remote.caches.deallocate_cache(cache)
    assert not remote.is_empty
    remote.caches.remove_cache_key(key(1))
    remote.caches.remove_cache_key(prefix(2))
    assert remote.is_empty


def test_registered_caches_have_no_references_to_drop(two_sided: World) -> None:
    arena, caches = Arena(5, TENSORS, ROWS, ROW_BYTES), two_sided.caches
    cache = caches.register_cache(arena.desc(), arena.addrs, [key(1)])
    caches.deallocate_cache(cache)
    for _ in range(2):
        two_sided.pull(key(1), arena, 0)
    caches.remove_cache_key(key(1))
    two_sided.pull_fails(key(1))
    caches.unregister_cache(cache.cache_id)


def test_without_a_pool(transport: str) -> None:
    with managed({"datadist.Transport": transport}) as engine:
        caches = CacheManager(engine, OURS, remote_accessible=False, pools=frozenset())
        arena = Arena(5)
        rows = caches.register_cache(arena.desc(), arena.addrs)
        blocks = caches.register_blocks_cache(arena.desc(Placement.HOST), Arena(6).addrs)
        disabled = LLMStatusCode.LLM_FEATURE_NOT_ENABLED
        assert failure(lambda: caches.deallocate_cache(rows)) == disabled
        assert failure(lambda: caches.deallocate_blocks_cache(blocks)) == disabled
        caches.remove_cache_key(key(1))  # a no-op, as with any key that nothing has
        assert rows.tensor_addrs == arena.addrs
