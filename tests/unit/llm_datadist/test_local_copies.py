"""Local copies: what they refuse and what they ask of the engine. No byte moves here."""

from __future__ import annotations

import re

import pytest
from support.recorded_caches import ADDRS, BLOCKS, CPU, DEVICE_DESC, INVALID, ROWS, Do, manager, refusal
from support.recording_engine import RecordingEngine

from vllm_datadist_connector.llm_datadist.data_type import DataType
from vllm_datadist_connector.llm_datadist.v2.llm_types import (
    Cache,
    CacheDesc,
    KvCache,
    Placement,
)


@pytest.fixture
def engine() -> RecordingEngine:
    return RecordingEngine()


def test_local_copies(engine: RecordingEngine) -> None:
    caches = manager(engine)
    caches.copy_cache(ROWS, Cache(6, DEVICE_DESC, ADDRS, is_blocks_cache=False), 1, 2, 16, 32, req_id=5)
    caches.copy_blocks(BLOCKS, {0: [1, 2], 3: [0]})
    caches.swap_blocks(CPU, BLOCKS, {0: 3, 2: 1})
    assert [tuple(call.arguments.values()) for call in engine.calls] == [
        (7, 6, 1, 2, 16, 32),
        (8, [0, 0, 3], [1, 2, 0]),
        (-1, ADDRS, 8, ADDRS, 64, [0, 2], [3, 1]),
    ]
    assert [call.name for call in engine.calls] == ["copy_row", "copy_blocks", "swap_blocks"]


def host(num_tensors: int = 4, shape: tuple[int, ...] = (4, 16)) -> Cache:
    desc = CacheDesc(num_tensors, shape, DataType.DT_INT32, Placement.HOST)
    return KvCache.create_cpu_cache(desc, list(range(1, num_tensors + 1)))


@pytest.mark.parametrize(
    ("do", "named"),
    [
        (lambda m: m.copy_cache(BLOCKS, ROWS), "dst: .*a contiguous cache"),
        (lambda m: m.copy_cache(ROWS, BLOCKS), "src: .*a contiguous cache"),
        (lambda m: m.copy_cache(ROWS, ROWS, size=0), "size: 0"),
        (lambda m: m.copy_blocks(ROWS, {0: [1]}), "cache: .*a blocks cache"),
        (lambda m: m.swap_blocks(ROWS, CPU, {0: 1}), "src_cache: .*a blocks cache"),
        (lambda m: m.swap_blocks(BLOCKS, BLOCKS, {0: 1}), "one HOST and one DEVICE"),
        (lambda m: m.swap_blocks(CPU, CPU, {0: 1}), "one HOST and one DEVICE"),
        (lambda m: m.swap_blocks(BLOCKS, host(num_tensors=2), {0: 1}), "num_tensors of dst_cache: 2, allowed: 4"),
        (lambda m: m.swap_blocks(BLOCKS, host(shape=(4, 8)), {0: 1}), "block bytes of dst_cache: 32, allowed: 64"),
        (lambda m: m.swap_blocks(BLOCKS, host(shape=(2, 16)), {0: 2}), r"src_to_dst value: 2, allowed: \[0, 1\]"),
        (lambda m: m.swap_blocks(host(shape=(2, 16)), BLOCKS, {2: 0}), r"src_to_dst key: 2, allowed: \[0, 1\]"),
        (lambda m: m.swap_blocks(CPU, BLOCKS, {-1: 0}), "src_to_dst key: -1"),
    ],
)
def test_logical_errors_of_local_copies(engine: RecordingEngine, do: Do, named: str) -> None:
    error = refusal(engine, do)
    assert error.status_code == INVALID
    assert re.search(named, str(error))


@pytest.mark.parametrize(
    ("do", "error"),
    [
        (lambda m: m.copy_cache(None, ROWS), AttributeError),
        (lambda m: m.copy_cache(ROWS, None), AttributeError),
        (lambda m: m.copy_cache(ROWS, ROWS, dst_batch_index=-1), ValueError),
        (lambda m: m.copy_cache(ROWS, ROWS, src_batch_index=2**32), ValueError),
        (lambda m: m.copy_cache(ROWS, ROWS, offset=-1), ValueError),
        (lambda m: m.copy_cache(ROWS, ROWS, size="1"), TypeError),
        (lambda m: m.copy_cache(ROWS, ROWS, req_id="1"), TypeError),
        (lambda m: m.copy_blocks(None, {0: [1]}), AttributeError),
        (lambda m: m.copy_blocks(BLOCKS, [(0, 1)]), TypeError),
        (lambda m: m.copy_blocks(BLOCKS, {"0": [1]}), TypeError),
        (lambda m: m.copy_blocks(BLOCKS, {0: 1}), TypeError),
        (lambda m: m.copy_blocks(BLOCKS, {0: ["1"]}), TypeError),
        (lambda m: m.swap_blocks(None, BLOCKS, {0: 1}), AttributeError),
        (lambda m: m.swap_blocks(CPU, None, {0: 1}), AttributeError),
        (lambda m: m.swap_blocks(CPU, BLOCKS, [(0, 1)]), TypeError),
        (lambda m: m.swap_blocks(CPU, BLOCKS, {0: "1"}), TypeError),
    ],
)
def test_types_in_local_copies(engine: RecordingEngine, do: Do, error: type[Exception]) -> None:
    with pytest.raises(error):
        do(manager(engine))
    assert engine.calls == []
