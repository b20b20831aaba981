"""CacheManager: what it refuses, with which exception, and what it asks of the engine. No byte moves here."""

from __future__ import annotations

import re
from typing import Any

import pytest
from support.recorded_caches import (
    ADDRS,
    BLOCKS,
    BY_ID,
    CPU,
    DEVICE_DESC,
    HOST_DESC,
    INVALID,
    NONE,
    ROWS,
    Do,
    manager,
    refusal,
)
from support.recording_engine import RecordingEngine

from vllm_datadist_connector import _native
from vllm_datadist_connector.llm_datadist.data_type import DataType
from vllm_datadist_connector.llm_datadist.status import LLMException, LLMStatusCode
from vllm_datadist_connector.llm_datadist.v2.cache_manager import CacheManager
from vllm_datadist_connector.llm_datadist.v2.llm_types import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    MemInfo,
    Memtype,
    Placement,
)


@pytest.fixture
def engine() -> RecordingEngine:
    return RecordingEngine()


def test_register_cache(engine: RecordingEngine) -> None:
    keys = [CacheKey(1, 5), CacheKey(1, NONE), CacheKey(1, NONE, 3, 6)]
    cache = manager(engine).register_cache(DEVICE_DESC, ADDRS, keys)
    assert (cache.cache_id, cache.tensor_addrs, cache.is_blocks_cache) == (7, ADDRS, False)
    assert engine.only_call() == (
        "register_cache",
        {
            "layout": _native.CACHE_CONTIGUOUS,
            "num_tensors": 4,
            "shape": [4, 16],
            "data_type": 3,
            "placement": 1,
            "addrs": ADDRS,
            "keys": [(_native.KEY_REQUEST, 5, 0), None, (_native.KEY_PREFIX, 6, 3)],
            "remote_accessible": True,
        },
    )


def test_register_blocks_cache(engine: RecordingEngine) -> None:
    caches = manager(engine)
    cache = caches.register_blocks_cache(HOST_DESC, [16, 0], BlocksCacheKey(1, 3))
    assert cache.is_blocks_cache
    arguments = engine.only_call().arguments
    assert arguments["layout"] == _native.CACHE_BLOCKS
    assert arguments["addrs"] == [16, 0], "number and value of the addresses are the engine's to judge"
    assert arguments["keys"] == [(_native.KEY_BLOCKS, 0, 3)]
    assert (arguments["placement"], arguments["remote_accessible"]) == (0, False)
    caches.register_blocks_cache(DEVICE_DESC, ADDRS)
    assert engine.calls[-1].arguments["keys"] == []


@pytest.mark.parametrize("method", ["register_cache", "register_blocks_cache"])
@pytest.mark.parametrize(
    ("desc", "linked", "asked", "expected"),
    [
        (DEVICE_DESC, False, None, True),
        (DEVICE_DESC, False, False, False),
        (DEVICE_DESC, True, None, False),
        (DEVICE_DESC, True, False, False),
        (HOST_DESC, False, None, False),
        (HOST_DESC, False, True, True),
    ],
)
def test_default_of_remote_accessible(
    engine: RecordingEngine, method: str, desc: CacheDesc, linked: bool, asked: bool | None, expected: bool
) -> None:
    caches = manager(engine)
    if linked:
        caches.set_is_call_linked()
    getattr(caches, method)(desc, ADDRS, remote_accessible=asked)
    assert engine.only_call().arguments["remote_accessible"] is expected


@pytest.mark.parametrize("method", ["register_cache", "register_blocks_cache"])
def test_nothing_becomes_remote_accessible_after_link(engine: RecordingEngine, method: str) -> None:
    caches = manager(engine)
    caches.set_is_call_linked()
    with pytest.raises(LLMException, match="remote_accessible: True") as caught:
        getattr(caches, method)(DEVICE_DESC, ADDRS, remote_accessible=True)
    assert caught.value.status_code == INVALID
    assert engine.calls == []


@pytest.mark.parametrize("method", ["register_cache", "register_blocks_cache"])
@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"cache_desc": None}, AttributeError, "cache_desc"),
        ({"cache_desc": 1}, TypeError, "cache_desc"),
        ({"addrs": tuple(ADDRS)}, TypeError, "addrs.*only support list"),
        ({"addrs": None}, TypeError, "addrs"),
        ({"addrs": ["16"]}, TypeError, "inner type only support int"),
        ({"addrs": [-1]}, ValueError, "out of range"),
        ({"addrs": []}, LLMException, "addrs: .*at least one"),
        ({"remote_accessible": 1}, TypeError, "remote_accessible"),
    ],
)
def test_registration_refuses(
    engine: RecordingEngine, method: str, arguments: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        getattr(manager(engine), method)(**{"cache_desc": DEVICE_DESC, "addrs": ADDRS} | arguments)
    assert engine.calls == []


@pytest.mark.parametrize(
    ("do", "named"),
    [
        (lambda m: m.register_cache(DEVICE_DESC, ADDRS[:3]), r"len\(addrs\): 3, allowed: 4"),
        (lambda m: m.register_cache(DEVICE_DESC, [16, 0, 48, 64]), r"addrs\[1\]: 0"),
        (lambda m: m.register_cache(DEVICE_DESC, ADDRS, [CacheKey(1, 2, 0, 3)]), "exactly one"),
        (lambda m: m.allocate_cache(CacheDesc(0, [4], DataType.DT_INT8)), "num_tensors: 0"),
        (lambda m: m.allocate_blocks_cache(CacheDesc(0, [4], DataType.DT_INT8)), "num_tensors: 0"),
        (lambda m: m.deallocate_cache(BLOCKS), "a contiguous cache"),
        (lambda m: m.deallocate_blocks_cache(ROWS), "a blocks cache"),
    ],
)
def test_logical_errors_of_registration_and_allocation(engine: RecordingEngine, do: Do, named: str) -> None:
    error = refusal(engine, do)
    assert error.status_code == INVALID
    assert re.search(named, str(error))


@pytest.mark.parametrize(
    ("do", "error"),
    [
        (lambda m: m.register_cache(DEVICE_DESC, ADDRS, None), TypeError),
        (lambda m: m.register_cache(DEVICE_DESC, ADDRS, [BlocksCacheKey(1)]), TypeError),
        (lambda m: m.register_blocks_cache(DEVICE_DESC, ADDRS, CacheKey(1, 2)), TypeError),
        (lambda m: m.register_blocks_cache(DEVICE_DESC, ADDRS, BlocksCacheKey(1, -1)), ValueError),
        (lambda m: m.unregister_cache("1"), TypeError),
        (lambda m: m.unregister_cache(2**63), ValueError),
        (lambda m: m.allocate_cache(None), AttributeError),
        (lambda m: m.allocate_cache(DEVICE_DESC, CacheKey(1, 2)), TypeError),
        (lambda m: m.allocate_blocks_cache(DEVICE_DESC, [BlocksCacheKey(1)]), TypeError),
        (lambda m: m.deallocate_cache(None), AttributeError),
        (lambda m: m.deallocate_cache(7), TypeError),
        (lambda m: m.deallocate_blocks_cache(None), AttributeError),
        (lambda m: m.remove_cache_key(BY_ID), TypeError),
        (lambda m: m.remove_cache_key(None), TypeError),
    ],
)
def test_types_in_registration_and_allocation(engine: RecordingEngine, do: Do, error: type[Exception]) -> None:
    with pytest.raises(error):
        do(manager(engine))
    assert engine.calls == []


@pytest.mark.parametrize("error", [TypeError, AttributeError])
@pytest.mark.parametrize(
    "do",
    [
        lambda m: m.allocate_cache(None),
        lambda m: m.deallocate_cache(None),
        lambda m: m.copy_cache(ROWS, None),
        lambda m: m.pull_cache(BY_ID, None),
    ],
)
def test_none_is_a_wrong_type_and_what_has_no_attributes(
    engine: RecordingEngine, do: Do, error: type[Exception]
) -> None:
    """Programs catch either, by the documentation of the call or by that of all others."""
    with pytest.raises(error):
        do(manager(engine))
    assert engine.calls == []


def test_unregister_cache(engine: RecordingEngine) -> None:
    manager(engine).unregister_cache(-3)
    assert engine.only_call() == ("unregister_cache", {"cache_id": -3})


def test_allocate_and_deallocate(engine: RecordingEngine) -> None:
    caches = manager(engine)
    cache = caches.allocate_cache(HOST_DESC, (CacheKey(1, NONE), CacheKey(1, 2)))
    assert (cache.cache_id, cache.tensor_addrs) == (8, [4096, 8192, 12288, 16384])
    arguments = engine.only_call().arguments
    assert (arguments["layout"], arguments["placement"]) == (_native.CACHE_CONTIGUOUS, 0)
    assert arguments["keys"] == [None, (_native.KEY_REQUEST, 2, 0)]
    caches.deallocate_cache(cache)
    assert engine.calls[-1] == ("deallocate_cache", {"cache_id": 8})
    assert cache.tensor_addrs == []
    caches.deallocate_cache(cache)
    assert len(engine.calls) == 3, "whether the id is known is the engine's to say"


def test_allocate_and_deallocate_blocks(engine: RecordingEngine) -> None:
    caches = manager(engine)
    cache = caches.allocate_blocks_cache(DEVICE_DESC, BlocksCacheKey(1, 3))
    arguments = engine.only_call().arguments
    assert (arguments["layout"], arguments["keys"]) == (_native.CACHE_BLOCKS, [(_native.KEY_BLOCKS, 0, 3)])
    caches.deallocate_blocks_cache(cache)
    assert engine.calls[-1] == ("deallocate_cache", {"cache_id": 8})
    assert cache.tensor_addrs == []


@pytest.mark.parametrize(
    ("desc", "pools", "option"),
    [
        (DEVICE_DESC, frozenset({Placement.HOST}), "mem_pool_cfg"),
        (HOST_DESC, frozenset({Placement.DEVICE}), "host_mem_pool_cfg"),
        (DEVICE_DESC, frozenset(), "mem_pool_cfg"),
    ],
)
def test_allocation_needs_a_pool_of_its_placement(
    engine: RecordingEngine, desc: CacheDesc, pools: frozenset[Placement], option: str
) -> None:
    for method in ("allocate_cache", "allocate_blocks_cache"):
        with pytest.raises(LLMException, match=rf"cache_desc\.placement.* {option} ") as caught:
            getattr(manager(engine, pools=pools), method)(desc)
        assert caught.value.status_code == INVALID
    assert engine.calls == []


def test_a_failed_deallocation_leaves_the_addresses(engine: RecordingEngine) -> None:
    engine.answers["deallocate_cache"] = _native.LLM_FEATURE_NOT_ENABLED
    cache = Cache(7, DEVICE_DESC, ADDRS, is_blocks_cache=False)
    with pytest.raises(LLMException, match=r"deallocate_cache.*LLM_FEATURE_NOT_ENABLED.*0x5010B019") as caught:
        manager(engine).deallocate_cache(cache)
    assert caught.value.status_code == LLMStatusCode.LLM_FEATURE_NOT_ENABLED
    assert cache.tensor_addrs == ADDRS


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (CacheKey(1, 5, 6), (_native.KEY_REQUEST, 5, 6)),
        (CacheKey(1, NONE, 6, 5), (_native.KEY_PREFIX, 5, 6)),
        (CacheKey(1, NONE, 6), (_native.KEY_REQUEST, NONE, 6)),
    ],
)
def test_remove_cache_key(engine: RecordingEngine, key: CacheKey, expected: _native.Key) -> None:
    manager(engine).remove_cache_key(key)
    assert engine.only_call() == ("remove_cache_key", {"key": expected})


# ---- remapping, the end ----


REGION = MemInfo(Memtype.MEM_TYPE_DEVICE, 4096, 64)


def test_remap_is_a_no_op_with_a_link(engine: RecordingEngine) -> None:
    manager(engine).remap_registered_memory(REGION)
    manager(engine).remap_registered_memory([REGION, REGION])
    engine.answers["has_links"] = False
    with pytest.raises(LLMException) as caught:
        manager(engine).remap_registered_memory(REGION)
    assert caught.value.status_code == LLMStatusCode.LLM_NOT_YET_LINK


@pytest.mark.parametrize(
    ("regions", "error"),
    [
        ([], LLMException),
        (MemInfo(Memtype.MEM_TYPE_HOST, 4096, 64), LLMException),
        ([REGION, MemInfo(Memtype.MEM_TYPE_DEVICE, 0, 64)], LLMException),
        (MemInfo(Memtype.MEM_TYPE_DEVICE, 4096, 0), LLMException),
        (None, TypeError),
        ((REGION,), TypeError),
        ([REGION, 1], TypeError),
    ],
)
def test_remap_refuses(engine: RecordingEngine, regions: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        manager(engine).remap_registered_memory(regions)
    if isinstance(caught.value, LLMException):
        assert caught.value.status_code == INVALID


def test_check_cache_key() -> None:
    CacheManager.check_cache_key(CacheKey(1, 2))
    with pytest.raises(LLMException):
        CacheManager.check_cache_key(CacheKey(1, NONE))


@pytest.mark.parametrize(
    "do",
    [
        lambda m: m.register_cache(DEVICE_DESC, ADDRS),
        lambda m: m.register_blocks_cache(DEVICE_DESC, ADDRS),
        lambda m: m.unregister_cache(1),
        lambda m: m.allocate_cache(DEVICE_DESC),
        lambda m: m.allocate_blocks_cache(DEVICE_DESC),
        lambda m: m.deallocate_cache(ROWS),
        lambda m: m.deallocate_blocks_cache(BLOCKS),
        lambda m: m.remove_cache_key(CacheKey(1, 2)),
        lambda m: m.copy_cache(ROWS, ROWS),
        lambda m: m.copy_blocks(BLOCKS, {0: [1]}),
        lambda m: m.swap_blocks(CPU, BLOCKS, {0: 1}),
        lambda m: m.pull_cache(BY_ID, ROWS),
        lambda m: m.pull_blocks(BlocksCacheKey(3), BLOCKS, [1], [1]),
        lambda m: m.push_cache(BY_ID, ROWS),
        lambda m: m.push_blocks(BlocksCacheKey(3), BLOCKS, [1], [1]),
        lambda m: m.remap_registered_memory(REGION),
    ],
)
def test_every_call_after_finalize_is_a_runtime_error(engine: RecordingEngine, do: Do) -> None:
    caches = manager(engine, remote_accessible=True)
    caches._finalize()
    with pytest.raises(RuntimeError, match="llm datadist is not initialized") as caught:
        do(caches)
    assert not isinstance(caught.value, LLMException)
    assert engine.calls == []
