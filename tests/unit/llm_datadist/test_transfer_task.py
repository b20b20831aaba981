"""The layer-wise task: which layers it waits for, what it pushes where, and what it says when something goes wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from support.recording_engine import RecordingEngine

from vllm_datadist_connector.llm_datadist.data_type import DataType
from vllm_datadist_connector.llm_datadist.status import LLMException, LLMStatusCode
from vllm_datadist_connector.llm_datadist.v2.cache_manager import CacheManager
from vllm_datadist_connector.llm_datadist.v2.llm_types import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKeyByIdAndIndex,
    CacheTask,
    LayerSynchronizer,
    Placement,
    TransferConfig,
    TransferWithCacheKeyConfig,
)

SUCCESS = LLMStatusCode.LLM_SUCCESS
INVALID = LLMStatusCode.LLM_PARAM_INVALID
NOT_LINKED = LLMStatusCode.LLM_NOT_YET_LINK
LAYERS = 4


class Ready(LayerSynchronizer):
    """Answers at once with `answer(layer)`."""

    def __init__(self, answer: Callable[[int], bool] = lambda _: True) -> None:
        self.asked: list[tuple[int, int | None]] = []
        self._answer = answer

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        self.asked.append((layer_index, timeout_in_millis))
        return self._answer(layer_index)


class Gate(LayerSynchronizer):
    """Holds every layer until open() and tells when the first one came."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self._open = threading.Event()

    def open(self) -> None:
        self._open.set()

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:  # noqa: ARG002
        self.entered.set()
        return self._open.wait(60)


@pytest.fixture
def engine() -> RecordingEngine:
    return RecordingEngine()


def manager(engine: RecordingEngine, remote_accessible: bool = False) -> CacheManager:
    return CacheManager(engine.native, 1, remote_accessible=remote_accessible, pools=frozenset())


def source(num_tensors: int = 2 * LAYERS, placement: Placement = Placement.DEVICE) -> Cache:
    desc = CacheDesc(num_tensors, [4, 16], DataType.DT_INT32, placement)
    return Cache(7, desc, range(1, num_tensors + 1), is_blocks_cache=False)


def to_addresses(cluster_id: int, layers: range | None = None, **fields: Any) -> TransferConfig:
    count = 2 * len(layers if layers is not None else range(LAYERS))
    return TransferConfig(cluster_id, [1000 * cluster_id + i for i in range(count)], layers, **fields)


def start(
    engine: RecordingEngine, configs: Sequence[Any], synchronizer: LayerSynchronizer | None = None, **blocks: Any
) -> CacheTask:
    keyed = any(isinstance(config, TransferWithCacheKeyConfig) for config in configs)
    return manager(engine, keyed).transfer_cache_async(source(), synchronizer or Ready(), configs, **blocks)


def test_layers_go_to_the_addresses_of_their_config(engine: RecordingEngine) -> None:
    synchronizer = Ready()
    task = start(engine, [to_addresses(5, range(1, 3)), to_addresses(6, range(2, 4), src_batch_index=3)], synchronizer)
    assert task.synchronize() == SUCCESS
    assert task.get_results() == [SUCCESS, SUCCESS]
    assert synchronizer.asked == [(1, None), (2, None), (3, None)], "layer 0 is used by no config"
    assert [
        (call.arguments["dst_cluster_id"], call.arguments["src_layer"], tuple(call.arguments["dst_addrs"]))
        for call in engine.calls
    ] == [(5, 1, (5000, 5001)), (5, 2, (5002, 5003)), (6, 2, (6000, 6001)), (6, 3, (6002, 6003))]
    assert [call.arguments["src_batch_index"] for call in engine.calls] == [0, 0, 3, 3]


def test_no_range_is_every_layer(engine: RecordingEngine) -> None:
    assert start(engine, [to_addresses(5)]).synchronize() == SUCCESS
    assert [call.arguments["src_layer"] for call in engine.calls] == [0, 1, 2, 3]


def test_destination_layers_count_from_the_start_of_their_range(engine: RecordingEngine) -> None:
    config = TransferWithCacheKeyConfig(CacheKeyByIdAndIndex(5, 9, 2), range(2, 4), range(1, 3), 3)
    assert start(engine, [config]).synchronize() == SUCCESS
    assert [(call.arguments["src_layer"], call.arguments["dst_layer"]) for call in engine.calls] == [(2, 1), (3, 2)]
    arguments = engine.calls[0].arguments
    assert (arguments["dst_cluster_id"], arguments["dst"], arguments["dst_batch_index"]) == (5, 9, 2)
    assert (arguments["src_cache_id"], arguments["src_batch_index"], arguments["tensor_num_per_layer"]) == (7, 3, 2)


def test_blocks_reach_the_engine(engine: RecordingEngine) -> None:
    config = TransferWithCacheKeyConfig(BlocksCacheKey(5), range(1), range(1))
    assert start(engine, [config], src_block_indices=[3, 1], dst_block_indices=[0, 2]).synchronize() == SUCCESS
    config = TransferWithCacheKeyConfig(BlocksCacheKey(5), range(1), range(1))
    assert start(engine, [config], dst_block_indices=(5, 4), dst_block_memory_size=24).synchronize() == SUCCESS
    asked = [(tuple(a["src_blocks"]), tuple(a["dst_blocks"]), a["dst_block_bytes"]) for _, a in engine.calls]
    assert asked == [((3, 1), (0, 2), 0), ((), (5, 4), 24)]


def test_configs_may_change_once_the_task_runs(engine: RecordingEngine) -> None:
    gate, config = Gate(), to_addresses(5)
    task = start(engine, [config], gate)
    assert gate.entered.wait(60)
    config.dst_cluster_id, config.src_layer_range, config.dst_addrs = 6, range(1), [1, 2]
    gate.open()
    assert task.synchronize() == SUCCESS
    assert [call.arguments["dst_cluster_id"] for call in engine.calls] == [5] * LAYERS
    assert engine.calls[-1].arguments["dst_addrs"] == (5006, 5007)


def test_a_layer_that_is_not_ready_ends_the_task(engine: RecordingEngine) -> None:
    configs = [to_addresses(5, range(1)), to_addresses(6, range(3)), to_addresses(7), to_addresses(8, range(3, 4))]
    synchronizer = Ready(lambda layer: layer != 2)
    task = start(engine, configs, synchronizer)
    assert task.synchronize() == INVALID
    assert task.get_results() == [SUCCESS, INVALID, INVALID, None]
    assert [layer for layer, _ in synchronizer.asked] == [0, 1, 2]


def test_the_first_failed_push_ends_the_task(engine: RecordingEngine) -> None:
    engine.answers["push_layer_to_addrs"] = lambda dst_cluster_id, src_layer, **_: (
        NOT_LINKED if (dst_cluster_id, src_layer) == (6, 1) else 0
    )
    task = start(engine, [to_addresses(5, range(2)), to_addresses(6), to_addresses(7)])
    assert task.synchronize() == NOT_LINKED
    assert task.get_results() == [SUCCESS, NOT_LINKED, None]
    assert [(a["dst_cluster_id"], a["src_layer"]) for _, a in engine.calls] == [(5, 0), (6, 0), (7, 0), (5, 1), (6, 1)]


def test_a_code_without_a_name_is_llm_failed(engine: RecordingEngine) -> None:
    engine.answers["push_layer_to_addrs"] = 77
    assert start(engine, [to_addresses(5)]).get_results() == [LLMStatusCode.LLM_FAILED]


def test_an_exception_in_the_synchronizer_leaves_no_results_and_is_no_success(engine: RecordingEngine) -> None:
    def fail(layer: int) -> bool:
        raise OSError(layer)

    task = start(engine, [to_addresses(5), to_addresses(6)], Ready(fail))
    assert task.get_results() == [None, None]
    assert task.synchronize() == LLMStatusCode.LLM_FAILED
    assert engine.calls == []


def test_a_running_task_times_out(engine: RecordingEngine) -> None:
    gate = Gate()
    task = start(engine, [to_addresses(5), to_addresses(6)], gate)
    assert gate.entered.wait(60)
    assert task.synchronize(1) == LLMStatusCode.LLM_TIMEOUT
    assert task.get_results(0) == [LLMStatusCode.LLM_TIMEOUT] * 2
    for timeout, error in ((-1, ValueError), (2**32, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="timeout_in_millis"):
            task.synchronize(timeout)  # type: ignore[arg-type]
    gate.open()
    assert task.get_results(60_000) == [SUCCESS, SUCCESS]


def test_timeouts_are_milliseconds(engine: RecordingEngine) -> None:
    gate = Gate()
    task = start(engine, [to_addresses(5)], gate)
    began = time.monotonic()
    assert task.synchronize(50) == LLMStatusCode.LLM_TIMEOUT
    assert 0.05 <= time.monotonic() - began < 25
    gate.open()
    assert task.synchronize() == SUCCESS


def test_finalize_waits_for_the_task(engine: RecordingEngine) -> None:
    gate, caches = Gate(), manager(engine)
    task = caches.transfer_cache_async(source(), gate, [to_addresses(5)])
    assert gate.entered.wait(60)
    finalizer = threading.Thread(target=caches._finalize)
    finalizer.start()
    gate.open()
    finalizer.join(60)
    assert not finalizer.is_alive()
    assert task.get_results(0) == [SUCCESS], "it had ended before finalize did"
    with pytest.raises(RuntimeError, match="not initialized"):
        caches.transfer_cache_async(source(), gate, [to_addresses(5)])


def test_no_task_starts_behind_a_finalize(engine: RecordingEngine) -> None:
    caches = manager(engine)

    class Finalizing(list[TransferConfig]):
        """Finalizes while it is looked at."""

        def __iter__(self) -> Iterator[TransferConfig]:
            caches._finalize()
            return super().__iter__()

    synchronizer = Ready()
    with pytest.raises(RuntimeError, match="not initialized"):
        caches.transfer_cache_async(source(), synchronizer, Finalizing([to_addresses(5)]))
    assert (synchronizer.asked, engine.calls) == ([], [])


def test_finalize_from_the_synchronizer_does_not_wait_for_itself(engine: RecordingEngine) -> None:
    caches = manager(engine)
    finalized: list[bool] = []

    def finalize(layer: int) -> bool:
        caches._finalize()
        finalized.append(caches._initialized)
        return layer < 0

    task = caches.transfer_cache_async(source(), Ready(finalize), [to_addresses(5)])
    assert task.synchronize(60_000) == INVALID
    assert finalized == [False]


@pytest.mark.parametrize(
    ("configs", "arguments", "named"),
    [
        ([to_addresses(5)], {"src_cache": source(placement=Placement.HOST)}, "placement"),
        ([to_addresses(5)], {"src_cache": source(7)}, "num_tensors: 7, allowed: an even number"),
        ([to_addresses(5)], {"src_block_indices": [1]}, "dst_block_indices"),
        ([to_addresses(5)], {"src_block_indices": [1], "dst_block_indices": [1, 2]}, r"len\(dst_block_indices\): 2"),
        ([to_addresses(5)], {"dst_block_indices": [1]}, "dst_block_memory_size: None"),
        ([to_addresses(5)], {"dst_block_indices": [1], "dst_block_memory_size": 0}, "dst_block_memory_size: 0"),
        ([to_addresses(5)], {"dst_block_memory_size": 8}, "dst_block_memory_size: 8"),
        ([to_addresses(5, range(3, 5))], {}, r"transfer_configs\[0\]\.src_layer_range: range\(3, 5\)"),
        ([to_addresses(5), TransferConfig(6, [1] * 7)], {}, r"transfer_configs\[1\]\.dst_addrs\): 7, allowed: 8"),
        ([TransferConfig(6, [1] * 3, range(1, 2))], {}, r"dst_addrs\): 3, allowed: 2"),
        (
            [to_addresses(5, src_batch_index=1)],
            {"src_block_indices": [1], "dst_block_indices": [1]},
            r"src_batch_index: 1, allowed: 0 with src_block_indices",
        ),
    ],
)
def test_arguments_that_contradict_each_other(
    engine: RecordingEngine, configs: list[TransferConfig], arguments: dict[str, Any], named: str
) -> None:
    synchronizer = Ready()
    with pytest.raises(LLMException, match=named) as caught:
        manager(engine).transfer_cache_async(
            **{"src_cache": source(), "layer_synchronizer": synchronizer, "transfer_configs": configs} | arguments
        )
    assert caught.value.status_code == INVALID
    assert synchronizer.asked == []
    assert engine.calls == []


KEYED = TransferWithCacheKeyConfig(BlocksCacheKey(5), range(1), range(1))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"src_cache": None}, AttributeError),
        ({"src_cache": 7}, TypeError),
        ({"layer_synchronizer": None}, TypeError),
        ({"layer_synchronizer": lambda _: True}, TypeError),
        ({"transfer_configs": None}, TypeError),
        ({"transfer_configs": to_addresses(5)}, TypeError),
        ({"transfer_configs": [KEYED]}, TypeError),
        ({"src_block_indices": 3}, TypeError),
        ({"dst_block_indices": ["1"]}, TypeError),
        ({"dst_block_memory_size": "8"}, TypeError),
        ({"dst_block_memory_size": -8}, ValueError),
    ],
)
def test_types_of_the_arguments(engine: RecordingEngine, arguments: dict[str, Any], error: type[Exception]) -> None:
    valid = {"src_cache": source(), "layer_synchronizer": Ready(), "transfer_configs": [to_addresses(5)]}
    with pytest.raises(error, match=next(iter(arguments))):
        manager(engine).transfer_cache_async(**valid | arguments)


def test_remote_accessible_mode_takes_keyed_configs_only(engine: RecordingEngine) -> None:
    with pytest.raises(TypeError, match="only support TransferWithCacheKeyConfig"):
        manager(engine, remote_accessible=True).transfer_cache_async(source(), Ready(), [to_addresses(5)])


def test_a_config_that_came_to_contradict_itself_is_refused(engine: RecordingEngine) -> None:
    config = TransferWithCacheKeyConfig(BlocksCacheKey(5), range(2), range(2))
    config.src_layer_range = range(3)
    with pytest.raises(LLMException, match="dst_layer_range"):
        start(engine, [config])
