"""The transfers of CacheManager: pull, push, and push layer by layer in the background."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_datadist_connector import _native
from vllm_datadist_connector.llm_datadist.status import param_invalid, raise_on_failure
from vllm_datadist_connector.llm_datadist.utils.utils import check_isinstance, check_uint32
from vllm_datadist_connector.llm_datadist.v2.cache_keys import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    cache_reference,
)
from vllm_datadist_connector.llm_datadist.v2.caches import Cache
from vllm_datadist_connector.llm_datadist.v2.interruptible import interruptible
from vllm_datadist_connector.llm_datadist.v2.llm_utils import (
    WHOLE,
    LayerSelection,
    check_block_ids,
    check_layer_range,
    check_pushed,
    check_size,
    check_tensor_num_per_layer,
    layer_span,
    require_blocks,
    require_contiguous,
)
from vllm_datadist_connector.llm_datadist.v2.manager_base import CacheManagerBase
from vllm_datadist_connector.llm_datadist.v2.transfer_configs import (
    LayerSynchronizer,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from vllm_datadist_connector.llm_datadist.v2.transfer_task import CacheTask


class CacheTransfers(CacheManagerBase):
    """Between a cache of ours and one of a linked peer, which makes no call. Each waits for its end.

    What the engine answers, beside LLM_PARAM_INVALID: LLM_KV_CACHE_NOT_EXIST (a cache or key that is unknown here or
    there), LLM_NOT_YET_LINK, LLM_TIMEOUT (after which the link must be made anew), LLM_FAILED (the link is lost).
    """

    def __init__(self, native: _native.ManagedDataDist, *, remote_accessible: bool) -> None:
        super().__init__(native)
        self._remote_accessible = remote_accessible

    @interruptible
    def pull_cache(
        self,
        cache_key: CacheKey | CacheKeyByIdAndIndex,
        cache: Cache,
        batch_index: int = 0,
        size: int = WHOLE,
        **kwargs: Any,
    ) -> None:
        """Reads one row of the peer's contiguous cache into row `batch_index` (uint32) of ours.

        size: bytes per tensor, -1 for one of our rows. Keywords: src_layer_range and dst_layer_range (range, step 1;
        default all layers), tensor_num_per_layer (uint32, default 2); others are ignored. Two-sided, a CacheKey with a
        req_id is consumed once every tensor was pulled by it; TypeError for a CacheKey in remote-accessible mode.
        AttributeError if cache is None. Source: LLM-DataDist Python, CacheManager.pull_cache.
        """
        engine = self._engine()
        allowed = CacheKeyByIdAndIndex if self._remote_accessible else (CacheKey, CacheKeyByIdAndIndex)
        check_isinstance("cache_key", cache_key, allowed, allow_none=False)
        cache = require_contiguous("cache", cache)
        check_uint32("batch_index", batch_index)
        check_size(size)
        layers = LayerSelection.from_kwargs(kwargs)
        src, src_batch_index = cache_reference(cache_key)
        status = engine.pull_rows(
            cache_key.cluster_id,
            src,
            cache.cache_id,
            src_batch_index,
            batch_index,
            size,
            layer_span(layers.src),
            layer_span(layers.dst),
            layers.tensor_num_per_layer,
        )
        raise_on_failure(status, "pull_cache", f"from {cache_key}")

    @interruptible
    def pull_blocks(
        self,
        src_cache_key: CacheKey | BlocksCacheKey | CacheKeyByIdAndIndex,
        dst_cache: Cache,
        src_blocks: Sequence[int] = (),
        dst_blocks: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        """Reads into blocks of our blocks cache, block indices in list order.

        With a BlocksCacheKey src_blocks[i] goes to dst_blocks[i]. With the other keys src_blocks must be empty: the
        k-th piece of the row, one of our blocks long, goes to dst_blocks[k]; the row's last piece may be shorter.
        Keywords and AttributeError as pull_cache. Source: LLM-DataDist Python, CacheManager.pull_blocks.
        """
        engine = self._engine()
        kinds = (CacheKey, BlocksCacheKey, CacheKeyByIdAndIndex)
        check_isinstance("src_cache_key", src_cache_key, kinds, allow_none=False)
        dst_cache = require_blocks("dst_cache", dst_cache)
        from_blocks = isinstance(src_cache_key, BlocksCacheKey)
        check_block_ids("src_blocks", src_blocks, allow_empty=not from_blocks)
        check_block_ids("dst_blocks", dst_blocks, allow_empty=False)
        if not from_blocks and src_blocks:
            raise param_invalid("src_blocks", src_blocks, f"none with a {type(src_cache_key).__name__}")
        if from_blocks and len(src_blocks) != len(dst_blocks):
            raise param_invalid("len(dst_blocks)", len(dst_blocks), f"{len(src_blocks)}, as many as src_blocks")
        layers = LayerSelection.from_kwargs(kwargs)
        src, src_batch_index = cache_reference(src_cache_key)
        status = engine.pull_blocks(
            src_cache_key.cluster_id,
            src,
            dst_cache.cache_id,
            src_blocks,
            dst_blocks,
            src_batch_index,
            layer_span(layers.src),
            layer_span(layers.dst),
            layers.tensor_num_per_layer,
        )
        raise_on_failure(status, "pull_blocks", f"from {src_cache_key}")

    @interruptible
    def push_cache(
        self,
        dst_cache_key: CacheKeyByIdAndIndex,
        src_cache: Cache,
        src_batch_index: int = 0,
        src_layer_range: range | None = None,
        dst_layer_range: range | None = None,
        size: int = WHOLE,
        tensor_num_per_layer: int = 2,
    ) -> None:
        """Writes row `src_batch_index` (uint32) of our contiguous cache to a row of the peer's; remote-accessible mode.

        src_cache: DEVICE. size must be -1. A layer range that is None is all layers of src_cache. Layer by layer: the
        first that fails raises, those before it stay written. Source: LLM-DataDist Python, CacheManager.push_cache.
        """
        engine = self._pushing_engine("push_cache")
        check_isinstance("dst_cache_key", dst_cache_key, CacheKeyByIdAndIndex, allow_none=False)
        check_isinstance("src_cache", src_cache, Cache, allow_none=False)
        check_pushed("src_cache", require_contiguous("src_cache", src_cache))
        check_uint32("src_batch_index", src_batch_index)
        check_size(size)
        if size != WHOLE:
            raise param_invalid("size", size, f"{WHOLE}: a push writes whole rows")
        layers, per_layer = _pushed_layers(src_cache, src_layer_range, dst_layer_range, tensor_num_per_layer)
        for src_layer, dst_layer in layers:
            status = engine.push_layer(
                src_cache.cache_id,
                src_layer,
                dst_cache_key.cluster_id,
                dst_cache_key.cache_id,
                dst_layer,
                src_batch_index,
                dst_cache_key.batch_index,
                tensor_num_per_layer=per_layer,
            )
            raise_on_failure(status, "push_cache", f"layer {src_layer} to layer {dst_layer} of {dst_cache_key}")

    @interruptible
    def push_blocks(
        self,
        dst_cache_key: BlocksCacheKey,
        src_cache: Cache,
        src_blocks: Sequence[int] = (),
        dst_blocks: Sequence[int] = (),
        src_layer_range: range | None = None,
        dst_layer_range: range | None = None,
        tensor_num_per_layer: int = 2,
    ) -> None:
        """Writes src_blocks[i] of our blocks cache to dst_blocks[i] of the peer's, in list order.

        Mode, placement, layer ranges and failures as push_cache. Source: LLM-DataDist Python, CacheManager.push_blocks.
        """
        engine = self._pushing_engine("push_blocks")
        check_isinstance("dst_cache_key", dst_cache_key, BlocksCacheKey, allow_none=False)
        check_isinstance("src_cache", src_cache, Cache, allow_none=False)
        check_pushed("src_cache", require_blocks("src_cache", src_cache))
        check_block_ids("src_blocks", src_blocks, allow_empty=True)
        check_block_ids("dst_blocks", dst_blocks, allow_empty=False)
        dst, _ = cache_reference(dst_cache_key)
        layers, per_layer = _pushed_layers(src_cache, src_layer_range, dst_layer_range, tensor_num_per_layer)
        for src_layer, dst_layer in layers:
            status = engine.push_layer(
                src_cache.cache_id,
                src_layer,
                dst_cache_key.cluster_id,
                dst,
                dst_layer,
                src_blocks=src_blocks,
                dst_blocks=dst_blocks,
                tensor_num_per_layer=per_layer,
            )
            raise_on_failure(status, "push_blocks", f"layer {src_layer} to layer {dst_layer} of {dst_cache_key}")

    def transfer_cache_async(
        self,
        src_cache: Cache,
        layer_synchronizer: LayerSynchronizer,
        transfer_configs: Sequence[TransferConfig] | Sequence[TransferWithCacheKeyConfig],
        src_block_indices: Sequence[int] | None = None,
        dst_block_indices: Sequence[int] | None = None,
        dst_block_memory_size: int | None = None,
    ) -> CacheTask:
        """Pushes layers (two tensors each) to the peers of all configs, each as soon as the synchronizer lets it.

        Configs are TransferConfig in two-sided mode, TransferWithCacheKeyConfig in remote-accessible mode (TypeError).
        Without block indices row to row; with both lists block to block; with dst_block_indices only, the row of a
        contiguous cache to blocks of dst_block_memory_size bytes. src_cache: DEVICE, an even number of tensors.
        AttributeError if src_cache is None. A layer that no config wants is not waited for; the first failure ends the
        task. Source: LLM-DataDist Python, CacheManager.transfer_cache_async.
        """
        kind = TransferWithCacheKeyConfig if self._remote_accessible else TransferConfig
        blocks = (src_block_indices, dst_block_indices, dst_block_memory_size)
        return self._start_transfer(src_cache, layer_synchronizer, transfer_configs, kind, blocks)

    def _pushing_engine(self, call: str) -> _native.ManagedDataDist:
        engine = self._engine()
        if not self._remote_accessible:
            raise param_invalid(f"{call} with enable_remote_cache_accessible", False, "True")
        return engine


def _pushed_layers(
    src_cache: Cache, src: range | None, dst: range | None, tensor_num_per_layer: int
) -> tuple[list[tuple[int, int]], int]:
    """(pairs of source and destination layers, tensors of each).

    Without ranges tensor_num_per_layer selects nothing: where it does not divide the tensors they go one by one.
    """
    check_layer_range("src_layer_range", src, allow_none=True)
    check_layer_range("dst_layer_range", dst, allow_none=True)
    check_tensor_num_per_layer(tensor_num_per_layer)
    num_tensors = src_cache.cache_desc.num_tensors
    if src is None and dst is None and num_tensors % tensor_num_per_layer != 0:
        return [(tensor, tensor) for tensor in range(num_tensors)], 1
    if tensor_num_per_layer > num_tensors:
        raise param_invalid("tensor_num_per_layer", tensor_num_per_layer, f"at most {num_tensors}, those of src_cache")
    every_layer = range(num_tensors // tensor_num_per_layer)
    src = every_layer if src is None else src
    dst = every_layer if dst is None else dst
    if len(src) != len(dst):
        raise param_invalid("dst_layer_range", dst, f"as many layers as src_layer_range {src}")
    return list(zip(src, dst, strict=True)), tensor_num_per_layer
