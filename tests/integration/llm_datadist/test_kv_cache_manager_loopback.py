"""The legacy KvCacheManager with memory: a prompt's and a decoder's manager over one engine, linked with itself."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from support.arenas import OURS, PEER, Arena, Bytes, link_with_itself, managed, view

from vllm_datadist_connector.llm_datadist.configs import LLMRole
from vllm_datadist_connector.llm_datadist.data_type import DataType
from vllm_datadist_connector.llm_datadist.status import LLMException, LLMStatusCode
from vllm_datadist_connector.llm_datadist.v1 import KvCacheManager
from vllm_datadist_connector.llm_datadist.v1.llm_types import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    KvCache,
    LayerSynchronizer,
    Placement,
    TransferConfig,
)

TENSORS, ROWS, ROW_BYTES = 4, 4, 40
DESC = CacheDesc(TENSORS, [ROWS, ROW_BYTES], DataType.DT_UINT8)
POOL_BYTES = 1 << 20
GONE = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST


class Ready(LayerSynchronizer):
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:  # noqa: ARG002
        return True


@dataclass
class Pair:
    prompt: KvCacheManager
    decoder: KvCacheManager
    devices: int

    def fill(self, cache: KvCache) -> list[list[Bytes]]:
        """Random content; per device the memory of each tensor."""
        random = np.random.default_rng(cache.cache_id)
        memory = [view(addrs, ROWS, ROW_BYTES) for addrs in cache.per_device_tensor_addrs]
        for tensors in memory:
            for tensor in tensors:
                tensor[:] = random.integers(0, 256, tensor.shape, dtype=np.uint8)
        return memory

    @property
    def is_empty(self) -> bool:
        """Whether nothing of the pool is in use: only then is there room for a cache that is as large."""
        whole = CacheDesc(16, [POOL_BYTES // 16 // self.devices], DataType.DT_UINT8)
        try:
            self.prompt.deallocate_cache(self.prompt.allocate_cache(whole))
        except LLMException as error:
            if error.status_code != LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY:
                raise
            return False
        return True


@pytest.fixture(params=[1, 2], ids=["one device", "two devices"])
def pair(request: pytest.FixtureRequest, transport: str) -> Iterator[Pair]:
    pool = json.dumps({"memory_size": POOL_BYTES, "page_shift": 12})
    with managed({"datadist.Transport": transport, "llm.MemPoolConfig": pool}) as engine:
        prompt, decoder = (
            KvCacheManager(engine, OURS, role, request.param) for role in (LLMRole.PROMPT, LLMRole.DECODER)
        )
        link_with_itself(engine)
        yield Pair(prompt, decoder, request.param)


def copies(memory: list[list[Bytes]]) -> list[list[Bytes]]:
    return [[tensor.copy() for tensor in tensors] for tensors in memory]


def assert_same(memory: list[list[Bytes]], expected: list[list[Bytes]]) -> None:
    for tensors, expected_tensors in zip(memory, expected, strict=True):
        for tensor, expected_tensor in zip(tensors, expected_tensors, strict=True):
            np.testing.assert_array_equal(tensor, expected_tensor)


def failure(call: Callable[[], object]) -> LLMStatusCode:
    with pytest.raises(LLMException) as caught:
        call()
    return caught.value.status_code


def test_pull_cache_uses_its_key_up(pair: Pair) -> None:
    src = pair.prompt.allocate_cache(DESC, [CacheKey(OURS, 1), CacheKey(OURS, 2)])
    dst = pair.decoder.allocate_cache(DESC)
    src_memory, dst_memory = pair.fill(src), pair.fill(dst)
    expected = copies(dst_memory)
    pair.decoder.pull_cache(CacheKey(PEER, 2), dst, 3, 16, src_cache_offset=4, dst_cache_offset=8)
    for device in range(pair.devices):
        for tensor in range(TENSORS):
            expected[device][tensor][3, 8:24] = src_memory[device][tensor][1, 4:20]
    assert_same(dst_memory, expected)
    assert failure(lambda: pair.decoder.pull_cache(CacheKey(PEER, 2), dst)) == GONE
    pair.decoder.pull_cache(CacheKey(PEER, 1), dst, 0, dst_cache_offset=8)
    for device in range(pair.devices):
        for tensor in range(TENSORS):
            expected[device][tensor][0, 8:] = src_memory[device][tensor][0, : ROW_BYTES - 8]
    assert_same(dst_memory, expected)
    pair.prompt.deallocate_cache(src)
    pair.decoder.deallocate_cache(dst)
    assert pair.is_empty


def test_layers_count_within_each_device(pair: Pair) -> None:
    src = pair.prompt.allocate_cache(DESC, [CacheKey(OURS, 1)])
    dst = pair.decoder.allocate_cache(DESC)
    src_memory, dst_memory = copies(pair.fill(src)), pair.fill(dst)
    pair.prompt.deallocate_cache(src)
    expected = copies(dst_memory)
    for src_layer, dst_layer in ((1, 0), (0, 1)):
        assert not pair.is_empty
        layers = {
            "src_layer_range": range(src_layer, src_layer + 1),
            "dst_layer_range": range(dst_layer, dst_layer + 1),
        }
        pair.decoder.pull_cache(CacheKey(PEER, 1), dst, 2, **layers)
        for device in range(pair.devices):
            for k in range(2):
                expected[device][2 * dst_layer + k][2] = src_memory[device][2 * src_layer + k][0]
        assert_same(dst_memory, expected)
    pair.decoder.deallocate_cache(dst)
    assert pair.is_empty, "every tensor of every device was pulled by the key"


def test_pull_blocks(pair: Pair) -> None:
    src = pair.prompt.allocate_blocks_cache(DESC, BlocksCacheKey(OURS, 3))
    dst = pair.decoder.allocate_blocks_cache(DESC)
    src_memory, dst_memory = pair.fill(src), pair.fill(dst)
    expected = copies(dst_memory)
    pair.decoder.pull_blocks(BlocksCacheKey(PEER, 3), dst, [3, 0], [1, 2], dst_layer_range=range(2))
    for device in range(pair.devices):
        for tensor in range(TENSORS):
            expected[device][tensor][1] = src_memory[device][tensor][3]
            expected[device][tensor][2] = src_memory[device][tensor][0]
    assert_same(dst_memory, expected)


def test_push_layers_to_addresses(pair: Pair) -> None:
    src, dst = pair.prompt.allocate_cache(DESC), pair.decoder.allocate_cache(DESC)
    src_memory, dst_memory = pair.fill(src), pair.fill(dst)
    expected = copies(dst_memory)
    addrs = [addr + ROW_BYTES for device in dst.per_device_tensor_addrs for addr in device[:2]]
    config = TransferConfig(PEER, addrs, range(1, 2), 3)
    assert pair.prompt.transfer_cache_async(src, Ready(), [config]).get_results(60_000) == [LLMStatusCode.LLM_SUCCESS]
    for device in range(pair.devices):
        for k in range(2):
            expected[device][k][1] = src_memory[device][2 + k][3]
    assert_same(dst_memory, expected)


def test_local_copies_on_every_device(pair: Pair) -> None:
    rows, more_rows = pair.prompt.allocate_cache(DESC), pair.prompt.allocate_cache(DESC)
    blocks = pair.prompt.allocate_blocks_cache(DESC)
    rows_memory, more_memory, blocks_memory = (pair.fill(cache) for cache in (rows, more_rows, blocks))
    host = [Arena(device, TENSORS, ROWS, ROW_BYTES) for device in range(pair.devices)]
    cpu = KvCache.create_cpu_cache(host[0].desc(Placement.HOST), [arena.addrs for arena in host])
    expected, expected_blocks = copies(more_memory), copies(blocks_memory)
    pair.prompt.copy_cache(more_rows, rows, 2, 1)
    pair.prompt.copy_blocks(blocks, {0: [2]})
    expected_host = [arena.copy() for arena in host]
    pair.prompt.swap_blocks(blocks, cpu, {2: 1, 3: 0})
    for device in range(pair.devices):
        for tensor in range(TENSORS):
            expected[device][tensor][2] = rows_memory[device][tensor][1]
            expected_blocks[device][tensor][2] = expected_blocks[device][tensor][0]
            expected_host[device][tensor][1] = expected_blocks[device][tensor][2]
            expected_host[device][tensor][0] = expected_blocks[device][tensor][3]
    assert_same(more_memory, expected)
    assert_same(blocks_memory, expected_blocks)
    assert host == expected_host


def test_tensors_are_views_of_the_cache(pair: Pair) -> None:
    desc = CacheDesc(TENSORS, [ROWS, 10], DataType.DT_FLOAT)
    cache = pair.decoder.allocate_cache(desc)
    memory = pair.fill(cache)
    tensors = pair.decoder.get_cache_tensors(cache, 2)
    assert len(tensors) == pair.devices
    for device, tensor in enumerate(tensors):
        array = tensor.numpy()
        assert (array.dtype, array.shape) == (np.float32, (ROWS, 10))
        array[1, 3] = 2.5
        np.testing.assert_array_equal(memory[device][2][1, 12:16], np.frombuffer(np.float32(2.5).tobytes(), np.uint8))


def test_an_abandoned_cache_is_freed_but_not_while_an_array_shows_it(pair: Pair) -> None:
    array = pair.decoder.get_cache_tensors(pair.decoder.allocate_cache(DESC))[0].numpy()
    gc.collect()
    assert not pair.is_empty
    array[:] = 1
    del array
    gc.collect()
    assert pair.is_empty


def test_roles_switch_what_is_allowed(pair: Pair) -> None:
    cache = pair.decoder.allocate_cache(DESC)
    pair.decoder._set_role(LLMRole.PROMPT)
    assert failure(lambda: pair.decoder.pull_cache(CacheKey(PEER, 1), cache)) == LLMStatusCode.LLM_PARAM_INVALID
    pair.decoder.remove_cache_key(CacheKey(OURS, 1))


def test_devices_may_have_more_tensors_together_than_a_registration(transport: str) -> None:
    pool = json.dumps({"memory_size": 4 << 20, "page_shift": 10})
    with managed({"datadist.Transport": transport, "llm.MemPoolConfig": pool}) as engine:
        link_with_itself(engine)
        prompt, decoder = (KvCacheManager(engine, OURS, role, 4) for role in (LLMRole.PROMPT, LLMRole.DECODER))
        desc = CacheDesc(122, [1, 16], DataType.DT_UINT8)
        src, dst = prompt.allocate_cache(desc, [CacheKey(OURS, 1)]), decoder.allocate_cache(desc)
        for device, addrs in enumerate(src.per_device_tensor_addrs):
            for tensor, memory in enumerate(view(addrs, 1, 16)):
                memory.view(np.uint16)[:] = 1000 * device + tensor
        decoder.pull_cache(CacheKey(PEER, 1), dst)
        for device, addrs in enumerate(dst.per_device_tensor_addrs):
            for tensor, memory in enumerate(view(addrs, 1, 16)):
                np.testing.assert_array_equal(memory.view(np.uint16), np.uint16(1000 * device + tensor))
