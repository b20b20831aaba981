"""What the managers of both generations share: copies within the process, running tasks, the end."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import ClassVar

from vllm_datadist_connector import _native
from vllm_datadist_connector.llm_datadist.status import LLMStatusCode, param_invalid, raise_on_failure
from vllm_datadist_connector.llm_datadist.utils.utils import (
    check_dict,
    check_list_element,
    check_uint32,
    check_uint64,
)
from vllm_datadist_connector.llm_datadist.v2 import layer_transfer
from vllm_datadist_connector.llm_datadist.v2.caches import Cache, CacheDesc, Placement
from vllm_datadist_connector.llm_datadist.v2.llm_utils import (
    WHOLE,
    check_size,
    require_blocks,
    require_contiguous,
)
from vllm_datadist_connector.llm_datadist.v2.transfer_configs import LayerSynchronizer
from vllm_datadist_connector.llm_datadist.v2.transfer_task import CacheTask


class CacheManagerBase:
    """Holds no caches, keys or references itself: they are the engine's. Calls from several threads are safe."""

    _unfinished: ClassVar[LLMStatusCode] = LLMStatusCode.LLM_TIMEOUT
    """What an unfinished CacheTask says."""

    def __init__(self, native: _native.ManagedDataDist) -> None:
        self._native = native
        self._initialized = True
        self._tasks_lock = threading.Lock()
        self._tasks: list[CacheTask] = []

    def copy_cache(
        self,
        dst: Cache,
        src: Cache,
        dst_batch_index: int = 0,
        src_batch_index: int = 0,
        offset: int = 0,
        size: int = WHOLE,
        req_id: int | None = None,
    ) -> None:
        """Copies `size` bytes at `offset` of a row of every tensor of `src` to the same offset of a row of `dst`.

        Both caches are contiguous caches of this process with as many tensors. Indices uint32, offset and req_id (used
        for nothing) uint64, size int64: -1 is the rest of the source's row. TypeError, ValueError, AttributeError for
        None; LLMException: LLM_PARAM_INVALID, LLM_KV_CACHE_NOT_EXIST. The result of overlapping rows is undefined.
        Source: LLM-DataDist Python, copy_cache.
        """
        engine = self._engine()
        dst = require_contiguous("dst", dst)
        src = require_contiguous("src", src)
        check_uint32("dst_batch_index", dst_batch_index)
        check_uint32("src_batch_index", src_batch_index)
        check_uint64("offset", offset)
        check_size(size)
        if req_id is not None:
            check_uint64("req_id", req_id)
        status = engine.copy_row(dst.cache_id, src.cache_id, dst_batch_index, src_batch_index, offset, size)
        raise_on_failure(status, "copy_cache")

    def copy_blocks(self, cache: Cache, copy_block_info: dict[int, list[int]]) -> None:
        """Copies, within one blocks cache, each key's block of every tensor to all blocks of its list, in that order.

        TypeError, AttributeError for None; LLMException: LLM_PARAM_INVALID (no blocks cache, an index out of range;
        earlier copies may have been done), LLM_KV_CACHE_NOT_EXIST. Source: LLM-DataDist Python, copy_blocks.
        """
        engine = self._engine()
        cache = require_blocks("cache", cache)
        check_dict("copy_block_info", copy_block_info, int, (list, tuple), allow_none=False)
        for src_block, dst_blocks in copy_block_info.items():
            check_list_element(f"copy_block_info[{src_block}]", dst_blocks, int)
        pairs = [(src, dst) for src, blocks in copy_block_info.items() for dst in blocks]
        status = engine.copy_blocks(cache.cache_id, [src for src, _ in pairs], [dst for _, dst in pairs])
        raise_on_failure(status, "copy_blocks")

    def swap_blocks(self, src_cache: Cache, dst_cache: Cache, src_to_dst: dict[int, int]) -> None:
        """Copies block `key` of every tensor of `src_cache` to block `value` of `dst_cache`: one way, despite the name.

        Two blocks caches of this process, one HOST (create_cpu_cache counts) and one DEVICE, with as many tensors and
        the same block size. TypeError, AttributeError for None; LLMException: LLM_PARAM_INVALID,
        LLM_KV_CACHE_NOT_EXIST. Source: LLM-DataDist Python, swap_blocks.
        """
        engine = self._engine()
        src_cache = require_blocks("src_cache", src_cache)
        dst_cache = require_blocks("dst_cache", dst_cache)
        check_dict("src_to_dst", src_to_dst, int, int, allow_none=False)
        block_bytes = _check_swappable(src_cache, dst_cache)
        _check_block_range("src_to_dst key", list(src_to_dst), src_cache.cache_desc)
        _check_block_range("src_to_dst value", list(src_to_dst.values()), dst_cache.cache_desc)
        status = engine.swap_blocks(
            src_cache.cache_id,
            src_cache.tensor_addrs,
            dst_cache.cache_id,
            dst_cache.tensor_addrs,
            block_bytes,
            list(src_to_dst),
            list(src_to_dst.values()),
        )
        raise_on_failure(status, "swap_blocks")

    def _engine(self) -> _native.ManagedDataDist:
        if not self._initialized:
            raise RuntimeError("llm datadist is not initialized: it was finalized, and this manager with it")
        return self._native

    def _start_transfer(
        self,
        src_cache: Cache,
        layer_synchronizer: LayerSynchronizer,
        transfer_configs: Sequence[layer_transfer.AnyTransferConfig],
        kind: type[layer_transfer.AnyTransferConfig],
        blocks: tuple[Sequence[int] | None, Sequence[int] | None, int | None],
        devices: int = 1,
    ) -> CacheTask:
        """Checks all arguments of transfer_cache_async and starts its task."""
        engine = self._engine()
        layer_transfer.check_source(src_cache, layer_synchronizer)
        layer_transfer.check_configs(transfer_configs, kind)
        num_layers = src_cache.cache_desc.num_tensors // layer_transfer.TENSORS_PER_LAYER
        source = layer_transfer.LayerSource(
            engine, src_cache.cache_id, num_layers, devices, layer_transfer.BlockLists.checked(*blocks)
        )
        pushes = layer_transfer.plan_pushes(source, transfer_configs)
        task = CacheTask(num_layers, layer_synchronizer, pushes, self._unfinished)
        with self._tasks_lock:
            self._engine()  # a finalize that came in between would not wait for the task
            self._tasks = [running for running in self._tasks if running.is_running]
            task.start()
            self._tasks.append(task)
        return task

    def _finalize(self) -> None:
        """Waits for running tasks, which need the engine; every call from then on raises RuntimeError."""
        with self._tasks_lock:
            self._initialized = False
            tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.wait_unless_own_thread()


def _check_swappable(src_cache: Cache, dst_cache: Cache) -> int:
    """Bytes of a block of both."""
    src, dst = src_cache.cache_desc, dst_cache.cache_desc
    if {src.placement, dst.placement} != {Placement.HOST, Placement.DEVICE}:
        raise param_invalid(
            "placements of (src_cache, dst_cache)", f"({src.placement}, {dst.placement})", "one HOST and one DEVICE"
        )
    if src.num_tensors != dst.num_tensors:
        raise param_invalid("num_tensors of dst_cache", dst.num_tensors, f"{src.num_tensors}, as in src_cache")
    if src.row_size != dst.row_size:
        raise param_invalid("block bytes of dst_cache", dst.row_size, f"{src.row_size}, as in src_cache")
    return src.row_size


def _check_block_range(name: str, block_ids: Sequence[int], cache_desc: CacheDesc) -> None:
    num_blocks = cache_desc.shape[0]
    for block_id in block_ids:
        if not 0 <= block_id < num_blocks:
            raise param_invalid(name, block_id, f"[0, {num_blocks - 1}]")
