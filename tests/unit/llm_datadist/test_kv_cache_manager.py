"""The legacy KvCacheManager: roles, devices, and what it asks of the engine. No byte moves here."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from typing import Any

import pytest
from support.recording_engine import RecordingEngine

from vllm_datadist_connector import _native
from vllm_datadist_connector.llm_datadist.configs import LLMRole
from vllm_datadist_connector.llm_datadist.data_type import DataType
from vllm_datadist_connector.llm_datadist.status import LLMException, LLMStatusCode
from vllm_datadist_connector.llm_datadist.v1 import KvCacheManager
from vllm_datadist_connector.llm_datadist.v1.llm_types import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    KvCache,
    LayerSynchronizer,
    Placement,
    TransferConfig,
)
from vllm_datadist_connector.llm_datadist.v2.llm_types import TransferWithCacheKeyConfig

PROMPT, DECODER, MIX = LLMRole.PROMPT, LLMRole.DECODER, LLMRole.MIX
INVALID = LLMStatusCode.LLM_PARAM_INVALID
DESC = CacheDesc(4, [4, 16], DataType.DT_INT32)
HOST_DESC = CacheDesc(4, [4, 16], DataType.DT_INT32, Placement.HOST)
ADDRS = [16, 32, 48, 64]
ROWS = KvCache(7, DESC, [ADDRS])
BLOCKS = KvCache(8, DESC, [ADDRS], is_blocks_cache=True)
KEY = CacheKey(3, 5)
BLOCKS_KEY = BlocksCacheKey(3, 4)
Do = Callable[[KvCacheManager], object]


class Ready(LayerSynchronizer):
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:  # noqa: ARG002
        return True


@pytest.fixture
def engine() -> RecordingEngine:
    return RecordingEngine()


def manager(engine: RecordingEngine, role: LLMRole = DECODER, devices: int = 1) -> KvCacheManager:
    return KvCacheManager(engine.native, 1, role, devices)


@pytest.mark.parametrize(
    ("do", "allowed"),
    [
        (lambda m: m.allocate_cache(DESC), {PROMPT, DECODER, MIX}),
        (lambda m: m.allocate_cache(DESC, [KEY]), {PROMPT}),
        (lambda m: m.allocate_blocks_cache(DESC), {PROMPT, DECODER, MIX}),
        (lambda m: m.allocate_blocks_cache(DESC, BLOCKS_KEY), {PROMPT, MIX}),
        (lambda m: m.deallocate_cache(KvCache(7, DESC, [ADDRS])), {PROMPT, DECODER, MIX}),
        (lambda m: m.remove_cache_key(KEY), {PROMPT}),
        (lambda m: m.pull_cache(KEY, ROWS), {DECODER}),
        (lambda m: m.pull_blocks(BLOCKS_KEY, BLOCKS, [1], [1]), {DECODER}),
        (lambda m: m.copy_cache(ROWS, ROWS), {PROMPT, DECODER, MIX}),
        (lambda m: m.copy_blocks(BLOCKS, {0: [1]}), {PROMPT, DECODER, MIX}),
        (lambda m: m.transfer_cache_async(ROWS, Ready(), [TransferConfig(3, ADDRS)]).synchronize(), {PROMPT}),
    ],
)
def test_roles(do: Do, allowed: set[LLMRole]) -> None:
    for role in LLMRole:
        engine = RecordingEngine()
        caches = manager(engine, role)
        if role in allowed:
            do(caches)
            assert engine.calls
            continue
        with pytest.raises(LLMException, match=str(role)) as caught:
            do(caches)
        assert caught.value.status_code == INVALID
        assert engine.calls == []


def test_a_switched_role_counts(engine: RecordingEngine) -> None:
    caches = manager(engine, DECODER)
    caches._set_role(PROMPT)
    caches.remove_cache_key(KEY)
    with pytest.raises(LLMException, match=re.escape("role of pull_cache: 'LLMRole.PROMPT', allowed: LLMRole.DECODER")):
        caches.pull_cache(KEY, ROWS)


@pytest.mark.parametrize("devices", [1, 3])
def test_allocation_gives_every_device_its_tensors(engine: RecordingEngine, devices: int) -> None:
    caches = manager(engine, PROMPT, devices)
    cache = caches.allocate_cache(DESC, [KEY])
    assert engine.only_call().arguments["num_tensors"] == 4 * devices
    assert engine.only_call().arguments["keys"] == [(_native.KEY_REQUEST, 5, 0)]
    flat = [4096 * (i + 1) for i in range(4 * devices)]
    assert cache.per_device_tensor_addrs == [flat[4 * device : 4 * device + 4] for device in range(devices)]
    assert cache.cache_desc.num_tensors == 4
    caches.deallocate_cache(cache)
    assert engine.calls[-1] == ("deallocate_cache", {"cache_id": 8})
    assert cache.per_device_tensor_addrs == []


def test_a_cache_that_is_dropped_is_deallocated_once(engine: RecordingEngine) -> None:
    caches = manager(engine)
    cache = caches.allocate_cache(DESC)
    caches.deallocate_cache(cache)
    del cache
    gc.collect()
    assert [call.name for call in engine.calls] == ["allocate_cache", "deallocate_cache"]
    caches.allocate_blocks_cache(DESC)
    gc.collect()
    assert [call.name for call in engine.calls][2:] == ["allocate_cache", "deallocate_cache"]


def test_a_cache_that_outlives_its_manager_is_left_alone(engine: RecordingEngine) -> None:
    caches = manager(engine)
    after_finalize = caches.allocate_cache(DESC)
    caches._finalize()
    del after_finalize
    other = manager(engine)
    after_manager = other.allocate_cache(DESC)
    del other
    gc.collect()
    del after_manager
    gc.collect()
    assert [call.name for call in engine.calls] == ["allocate_cache", "allocate_cache"]


def test_pull_cache(engine: RecordingEngine) -> None:
    caches = manager(engine)
    caches.pull_cache(KEY, ROWS, 1, 32, src_cache_offset=8, dst_cache_offset=16, dst_layer_range=range(1, 2))
    caches.pull_cache(CacheKeyByIdAndIndex(3, 9, 2), ROWS)
    assert [tuple(call.arguments.values()) for call in engine.calls] == [
        (3, (_native.KEY_REQUEST, 5, 0), 7, 0, 1, 32, None, (1, 2), 2, 8, 16),
        (3, 9, 7, 2, 0, -1, None, None, 2, 0, 0),
    ]


def test_pull_blocks(engine: RecordingEngine) -> None:
    manager(engine).pull_blocks(BLOCKS_KEY, BLOCKS, [3, 1], [0, 2], src_layer_range=range(1), tensor_num_per_layer=1)
    assert tuple(engine.only_call().arguments.values()) == (
        (3, (_native.KEY_BLOCKS, 0, 4), 8, [3, 1], [0, 2], 0, (0, 1), None, 1)
    )


@pytest.mark.parametrize(
    ("kwargs", "spans"),
    [
        ({}, [(None, None)]),
        ({"src_layer_range": range(1), "dst_layer_range": range(1, 2)}, [((0, 1), (1, 2)), ((2, 3), (3, 4))]),
        ({"src_layer_range": range(2)}, [((0, 2), (0, 2)), ((2, 4), (2, 4))]),
        ({"dst_layer_range": range(1, 2)}, [((0, 1), (1, 2)), ((1, 2), (3, 4))]),
        ({"src_layer_range": range(3, 4), "tensor_num_per_layer": 1}, [((3, 4), (0, 4)), ((7, 8), (4, 8))]),
    ],
)
def test_layer_ranges_count_within_each_device(
    engine: RecordingEngine, kwargs: dict[str, Any], spans: list[tuple[_native.LayerSpan, _native.LayerSpan]]
) -> None:
    caches = manager(engine, devices=2)
    caches.pull_cache(KEY, ROWS, **kwargs)
    assert [(a["src_layers"], a["dst_layers"]) for _, a in engine.calls] == spans
    caches.pull_blocks(BLOCKS_KEY, BLOCKS, [1], [1], **kwargs)
    assert [(a["src_layers"], a["dst_layers"]) for _, a in engine.calls] == spans * 2


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"src_layer_range": range(2, 3)}, r"src_layer_range: range\(2, 3\), allowed: layers in \[0, 2\)"),
        ({"dst_layer_range": range(1, 3)}, "dst_layer_range"),
        ({"dst_layer_range": range(1), "tensor_num_per_layer": 3}, "tensor_num_per_layer: 3"),
    ],
)
def test_layer_ranges_do_not_reach_into_the_next_device(
    engine: RecordingEngine, kwargs: dict[str, Any], named: str
) -> None:
    with pytest.raises(LLMException, match=named):
        manager(engine, devices=2).pull_cache(KEY, ROWS, **kwargs)
    assert engine.calls == []


def test_transfer_to_several_devices(engine: RecordingEngine) -> None:
    caches = manager(engine, PROMPT, 2)
    cache = KvCache(7, DESC, [ADDRS, ADDRS])
    addrs = [100, 101, 200, 201]
    task = caches.transfer_cache_async(cache, Ready(), [TransferConfig(3, addrs, range(1, 2))])
    assert task.synchronize() == LLMStatusCode.LLM_SUCCESS
    assert [(a["src_layer"], a["dst_addrs"]) for _, a in engine.calls] == [(1, (100, 101)), (3, (200, 201))]
    with pytest.raises(LLMException, match=r"dst_addrs\): 2, allowed: 4: 2 for each of 1 layers on each of 2 devices"):
        caches.transfer_cache_async(cache, Ready(), [TransferConfig(3, addrs[:2], range(1, 2))])
    config: Any = TransferWithCacheKeyConfig(BLOCKS_KEY, range(1), range(1))
    with pytest.raises(TypeError, match="only support TransferConfig"):
        caches.transfer_cache_async(cache, Ready(), [config])


@pytest.mark.parametrize(
    ("do", "error", "named"),
    [
        (lambda m: m.allocate_cache(HOST_DESC), LLMException, "placement"),
        (lambda m: m.allocate_blocks_cache(HOST_DESC), LLMException, "placement"),
        (lambda m: m.allocate_cache(CacheDesc(0, [4], DataType.DT_INT8)), LLMException, "num_tensors"),
        (lambda m: m.allocate_cache(None), AttributeError, "cache_desc"),
        (lambda m: m.allocate_cache(DESC, KEY), TypeError, "cache_keys"),
        (lambda m: m.allocate_blocks_cache(DESC, KEY), TypeError, "blocks_cache_key"),
        (lambda m: m.deallocate_cache(KvCache.create_cpu_cache(HOST_DESC, ADDRS)), LLMException, "cache"),
        (lambda m: m.deallocate_cache(7), TypeError, "cache"),
        (lambda m: m.deallocate_cache(None), AttributeError, "cache"),
        (lambda m: m.pull_cache(BLOCKS_KEY, ROWS), TypeError, "cache_key"),
        (lambda m: m.pull_cache(CacheKey(3, 2**64 - 1), ROWS), LLMException, "exactly one"),
        (lambda m: m.pull_cache(KEY, BLOCKS), LLMException, "kv_cache"),
        (lambda m: m.pull_cache(KEY, None), AttributeError, "kv_cache"),
        (lambda m: m.pull_cache(KEY, ROWS, -1), ValueError, "batch_index"),
        (lambda m: m.pull_cache(KEY, ROWS, size=0), LLMException, "size"),
        (lambda m: m.pull_cache(KEY, ROWS, src_cache_offset=-1), ValueError, "src_cache_offset"),
        (lambda m: m.pull_cache(KEY, ROWS, dst_cache_offset=-1), ValueError, "dst_cache_offset"),
        (lambda m: m.pull_cache(KEY, ROWS, dst_cache_offset="0"), TypeError, "dst_cache_offset"),
        (lambda m: m.pull_blocks(KEY, BLOCKS, [1], [1]), TypeError, "prompt_cache_key"),
        (lambda m: m.pull_blocks(BLOCKS_KEY, ROWS, [1], [1]), LLMException, "decoder_kv_cache"),
        (lambda m: m.pull_blocks(BLOCKS_KEY, BLOCKS, [], [1]), LLMException, "prompt_blocks"),
        (lambda m: m.pull_blocks(BLOCKS_KEY, BLOCKS, [1], []), LLMException, "decoder_blocks"),
        (lambda m: m.pull_blocks(BLOCKS_KEY, BLOCKS, [1], [1, 2]), LLMException, "decoder_blocks"),
        (lambda m: m.get_cache_tensors(ROWS, 4), LLMException, r"tensor_index: 4, allowed: \[0, 3\]"),
        (lambda m: m.get_cache_tensors(ROWS, -1), ValueError, "tensor_index"),
        (lambda m: m.get_cache_tensors(None), AttributeError, "cache"),
    ],
)
def test_refusals(engine: RecordingEngine, do: Do, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named) as caught:
        do(manager(engine))
    if isinstance(caught.value, LLMException):
        assert caught.value.status_code == INVALID
    assert engine.calls == []


def test_tensors_of_a_deallocated_cache(engine: RecordingEngine) -> None:
    caches = manager(engine)
    cache = caches.allocate_cache(DESC)
    caches.deallocate_cache(cache)
    with pytest.raises(LLMException) as caught:
        caches.get_cache_tensors(cache)
    assert caught.value.status_code == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST


def test_finalized(engine: RecordingEngine) -> None:
    caches = manager(engine)
    assert caches.is_initialized()
    caches._finalize()
    assert not caches.is_initialized()
    with pytest.raises(RuntimeError, match="not initialized"):
        caches.pull_cache(KEY, ROWS)


def test_an_unfinished_task_has_the_legacy_code(engine: RecordingEngine) -> None:
    assert manager(engine, PROMPT)._unfinished == LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT
