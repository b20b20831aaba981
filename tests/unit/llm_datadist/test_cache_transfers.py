"""Pull and push of CacheManager: what they refuse and what they ask of the engine. No byte moves here."""

from __future__ import annotations

import re

import pytest
from support.recorded_caches import BLOCKS, BY_ID, CPU, HOST_ROWS, INVALID, NONE, ROWS, Do, manager, refusal
from support.recording_engine import RecordingEngine

from vllm_datadist_connector import _native
from vllm_datadist_connector.llm_datadist.status import LLMException, LLMStatusCode
from vllm_datadist_connector.llm_datadist.v2.llm_types import (
    BlocksCacheKey,
    CacheKey,
)


@pytest.fixture
def engine() -> RecordingEngine:
    return RecordingEngine()


# ---- pull ----


def test_pull_cache(engine: RecordingEngine) -> None:
    caches = manager(engine)
    caches.pull_cache(CacheKey(3, 5, 6), ROWS)
    caches.pull_cache(
        BY_ID, ROWS, 1, 64, src_layer_range=range(1), dst_layer_range=range(1, 2), tensor_num_per_layer=1, unknown=True
    )
    defaults = {"dst_cache_id": 7, "src_layers": None, "dst_layers": None, "tensor_num_per_layer": 2}
    first = {"src_cluster_id": 3, "src": (_native.KEY_REQUEST, 5, 6), "src_batch_index": 0, "dst_batch_index": 0}
    assert engine.calls[0] == ("pull_rows", defaults | first | {"size": -1})
    second = {"src_cluster_id": 3, "src": 9, "src_batch_index": 2, "dst_batch_index": 1, "size": 64}
    layers = {"src_layers": (0, 1), "dst_layers": (1, 2), "tensor_num_per_layer": 1}
    assert engine.calls[1] == ("pull_rows", defaults | second | layers)


def test_pull_blocks(engine: RecordingEngine) -> None:
    caches = manager(engine, remote_accessible=True)
    caches.pull_blocks(BlocksCacheKey(3, 4), BLOCKS, [3, 1], (0, 2), src_layer_range=range(1, 2))
    caches.pull_blocks(BY_ID, BLOCKS, dst_blocks=[0, 2])
    caches.pull_blocks(CacheKey(3, 5), BLOCKS, dst_blocks=[0, 2])
    assert [
        (a["src"], a["src_batch_index"], list(a["src_blocks"]), list(a["dst_blocks"]), a["src_layers"])
        for _, a in engine.calls
    ] == [
        ((_native.KEY_BLOCKS, 0, 4), 0, [3, 1], [0, 2], (1, 2)),
        (9, 2, [], [0, 2], None),
        ((_native.KEY_REQUEST, 5, 0), 0, [], [0, 2], None),
    ]


@pytest.mark.parametrize(
    ("do", "named"),
    [
        (lambda m: m.pull_cache(BY_ID, BLOCKS), "cache: .*a contiguous cache"),
        (lambda m: m.pull_cache(CacheKey(3, NONE), ROWS), "exactly one"),
        (lambda m: m.pull_cache(CacheKey(3, 1, 0, 1), ROWS), "exactly one"),
        (lambda m: m.pull_cache(BY_ID, ROWS, size=0), "size: 0"),
        (lambda m: m.pull_cache(BY_ID, ROWS, size=-2), "size: -2"),
        (lambda m: m.pull_cache(BY_ID, ROWS, src_layer_range=range(0, 4, 2)), "src_layer_range"),
        (lambda m: m.pull_cache(BY_ID, ROWS, dst_layer_range=range(-1, 2)), "dst_layer_range"),
        (lambda m: m.pull_cache(BY_ID, ROWS, dst_layer_range=range(2, 2)), "dst_layer_range"),
        (lambda m: m.pull_cache(BY_ID, ROWS, dst_layer_range=range(2**31)), "dst_layer_range"),
        (lambda m: m.pull_cache(BY_ID, ROWS, tensor_num_per_layer=0), "tensor_num_per_layer: 0"),
        (lambda m: m.pull_blocks(BlocksCacheKey(3), ROWS, [1], [1]), "dst_cache: .*a blocks cache"),
        (lambda m: m.pull_blocks(BlocksCacheKey(3), BLOCKS, [], [1]), "src_blocks"),
        (lambda m: m.pull_blocks(BlocksCacheKey(3), BLOCKS, [1], []), "dst_blocks"),
        (lambda m: m.pull_blocks(BlocksCacheKey(3), BLOCKS, [1], [1, 2]), r"len\(dst_blocks\): 2, allowed: 1"),
        (lambda m: m.pull_blocks(BY_ID, BLOCKS, [1], [1]), "src_blocks.*none with a CacheKeyByIdAndIndex"),
        (lambda m: m.pull_blocks(CacheKey(3, 5), BLOCKS, [1], [1]), "src_blocks.*none with a CacheKey"),
        (lambda m: m.pull_blocks(BY_ID, BLOCKS), "dst_blocks"),
        (lambda m: m.pull_blocks(CacheKey(3, NONE), BLOCKS, [], [1]), "exactly one"),
        (lambda m: m.pull_blocks(BY_ID, BLOCKS, [], [1], src_layer_range=range(0, 2, 2)), "src_layer_range"),
    ],
)
def test_logical_errors_of_pull(engine: RecordingEngine, do: Do, named: str) -> None:
    error = refusal(engine, do)
    assert error.status_code == INVALID
    assert re.search(named, str(error))


@pytest.mark.parametrize(
    ("do", "error"),
    [
        (lambda m: m.pull_cache(None, ROWS), TypeError),
        (lambda m: m.pull_cache(BlocksCacheKey(3), ROWS), TypeError),
        (lambda m: m.pull_cache(BY_ID, None), AttributeError),
        (lambda m: m.pull_cache(BY_ID, 7), TypeError),
        (lambda m: m.pull_cache(BY_ID, ROWS, "0"), TypeError),
        (lambda m: m.pull_cache(BY_ID, ROWS, 2**32), ValueError),
        (lambda m: m.pull_cache(BY_ID, ROWS, size=None), TypeError),
        (lambda m: m.pull_cache(BY_ID, ROWS, size=2**63), ValueError),
        (lambda m: m.pull_cache(BY_ID, ROWS, src_layer_range=(0, 1)), TypeError),
        (lambda m: m.pull_cache(BY_ID, ROWS, tensor_num_per_layer=2**32), ValueError),
        (lambda m: m.pull_cache(BY_ID, ROWS, tensor_num_per_layer=None), TypeError),
        (lambda m: m.pull_blocks(None, BLOCKS, [1], [1]), TypeError),
        (lambda m: m.pull_blocks(BlocksCacheKey(3), None, [1], [1]), AttributeError),
        (lambda m: m.pull_blocks(BlocksCacheKey(3), BLOCKS, {1: 1}, [1]), TypeError),
        (lambda m: m.pull_blocks(BlocksCacheKey(3), BLOCKS, [1], ["1"]), TypeError),
        (lambda m: m.pull_blocks(BlocksCacheKey(-3), BLOCKS, [1], [1]), ValueError),
    ],
)
def test_types_in_pull(engine: RecordingEngine, do: Do, error: type[Exception]) -> None:
    with pytest.raises(error):
        do(manager(engine))
    assert engine.calls == []


def test_a_cache_key_pulls_no_rows_in_remote_accessible_mode(engine: RecordingEngine) -> None:
    with pytest.raises(TypeError, match=r"cache_key.*only support CacheKeyByIdAndIndex"):
        manager(engine, remote_accessible=True).pull_cache(CacheKey(3, 5), ROWS)  # type: ignore[arg-type]


# ---- push ----


def test_push_cache_goes_layer_by_layer(engine: RecordingEngine) -> None:
    caches = manager(engine, remote_accessible=True)
    caches.push_cache(BY_ID, ROWS, 1)
    caches.push_cache(BY_ID, ROWS, 0, range(2, 4), range(1, 3), tensor_num_per_layer=1)
    assert [(a["src_layer"], a["dst_layer"], a["src_batch_index"]) for _, a in engine.calls] == [
        (0, 0, 1),
        (1, 1, 1),
        (2, 1, 0),
        (3, 2, 0),
    ]
    assert engine.calls[0] == (
        "push_layer",
        {
            "src_cache_id": 7,
            "src_layer": 0,
            "dst_cluster_id": 3,
            "dst": 9,
            "dst_layer": 0,
            "src_batch_index": 1,
            "dst_batch_index": 2,
            "tensor_num_per_layer": 2,
        },
    )


def test_push_blocks_goes_layer_by_layer(engine: RecordingEngine) -> None:
    caches = manager(engine, remote_accessible=True)
    caches.push_blocks(BlocksCacheKey(3, 4), BLOCKS, [1, 2], [3, 0], dst_layer_range=range(5, 7))
    assert [(a["src_layer"], a["dst_layer"]) for _, a in engine.calls] == [(0, 5), (1, 6)]
    arguments = engine.calls[0].arguments
    assert arguments["dst"] == (_native.KEY_BLOCKS, 0, 4)
    assert (arguments["src_blocks"], arguments["dst_blocks"]) == ([1, 2], [3, 0])


@pytest.mark.parametrize("per_layer", [3, 5])
def test_uneven_layers_are_pushed_tensor_by_tensor(engine: RecordingEngine, per_layer: int) -> None:
    """Where no layers are chosen, how many tensors they have selects nothing."""
    manager(engine, remote_accessible=True).push_cache(BY_ID, ROWS, tensor_num_per_layer=per_layer)
    pushed = [(call.arguments["src_layer"], call.arguments["tensor_num_per_layer"]) for call in engine.calls]
    assert pushed == [(0, 1), (1, 1), (2, 1), (3, 1)]


def test_the_first_layer_that_fails_ends_a_push(engine: RecordingEngine) -> None:
    engine.answers["push_layer"] = lambda src_layer, **_: _native.LLM_NOT_YET_LINK if src_layer == 1 else 0
    with pytest.raises(LLMException, match="layer 1 to layer 1 of CacheKeyByIdAndIndex") as caught:
        manager(engine, remote_accessible=True).push_cache(BY_ID, ROWS, tensor_num_per_layer=1)
    assert caught.value.status_code == LLMStatusCode.LLM_NOT_YET_LINK
    assert [call.arguments["src_layer"] for call in engine.calls] == [0, 1]


@pytest.mark.parametrize(
    ("do", "named"),
    [
        (lambda m: m.push_cache(BY_ID, BLOCKS), "src_cache: .*a contiguous cache"),
        (lambda m: m.push_cache(BY_ID, HOST_ROWS), r"src_cache\.cache_desc\.placement: .*HOST.*DEVICE"),
        (lambda m: m.push_cache(BY_ID, ROWS, size=64), "size: 64"),
        (lambda m: m.push_cache(BY_ID, ROWS, size=0), "size: 0"),
        (lambda m: m.push_cache(BY_ID, ROWS, src_layer_range=range(1)), r"dst_layer_range: range\(0, 2\)"),
        (lambda m: m.push_cache(BY_ID, ROWS, 0, range(1), range(2)), "dst_layer_range"),
        (lambda m: m.push_cache(BY_ID, ROWS, 0, range(1, 1), range(1, 1)), "src_layer_range"),
        (lambda m: m.push_cache(BY_ID, ROWS, 0, range(0, 2, 2), range(1)), "src_layer_range"),
        (
            lambda m: m.push_cache(BY_ID, ROWS, 0, range(1), range(1), tensor_num_per_layer=5),
            "tensor_num_per_layer: 5, allowed: at most 4",
        ),
        (lambda m: m.push_cache(BY_ID, ROWS, tensor_num_per_layer=0), "tensor_num_per_layer: 0"),
        (lambda m: m.push_blocks(BlocksCacheKey(3), ROWS, [1], [1]), "src_cache: .*a blocks cache"),
        (lambda m: m.push_blocks(BlocksCacheKey(3), CPU, [1], [1]), r"src_cache\.cache_desc\.placement"),
        (lambda m: m.push_blocks(BlocksCacheKey(3), BLOCKS, [1]), "dst_blocks"),
        (lambda m: m.push_blocks(BlocksCacheKey(3), BLOCKS, [1], [1], range(1), range(2)), "dst_layer_range"),
    ],
)
def test_logical_errors_of_push(engine: RecordingEngine, do: Do, named: str) -> None:
    error = refusal(engine, do, remote_accessible=True)
    assert error.status_code == INVALID
    assert re.search(named, str(error))


@pytest.mark.parametrize(
    ("do", "error"),
    [
        (lambda m: m.push_cache(None, ROWS), TypeError),
        (lambda m: m.push_cache(BY_ID, None), TypeError),
        (lambda m: m.push_cache(CacheKey(3, 5), ROWS), TypeError),
        (lambda m: m.push_cache(BY_ID, ROWS, -1), ValueError),
        (lambda m: m.push_cache(BY_ID, ROWS, src_layer_range=[0]), TypeError),
        (lambda m: m.push_blocks(BY_ID, BLOCKS, [1], [1]), TypeError),
        (lambda m: m.push_blocks(BlocksCacheKey(3), None, [1], [1]), TypeError),
        (lambda m: m.push_blocks(BlocksCacheKey(3), BLOCKS, 1, [1]), TypeError),
    ],
)
def test_types_in_push(engine: RecordingEngine, do: Do, error: type[Exception]) -> None:
    with pytest.raises(error):
        do(manager(engine, remote_accessible=True))
    assert engine.calls == []


@pytest.mark.parametrize(
    "do", [lambda m: m.push_cache(BY_ID, ROWS), lambda m: m.push_blocks(BlocksCacheKey(3), BLOCKS, [1], [1])]
)
def test_push_needs_remote_accessible_mode(engine: RecordingEngine, do: Do) -> None:
    error = refusal(engine, do)
    assert error.status_code == INVALID
    assert "enable_remote_cache_accessible" in str(error)
