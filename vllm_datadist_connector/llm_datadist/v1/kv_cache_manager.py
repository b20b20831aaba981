"""KvCacheManager: caches and keys in legacy mode, where the role says which calls are allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias

from vllm_datadist_connector import _native
from vllm_datadist_connector.llm_datadist.configs import LLMRole
from vllm_datadist_connector.llm_datadist.status import (
    LLMStatusCode,
    failure,
    param_invalid,
    raise_on_failure,
)
from vllm_datadist_connector.llm_datadist.utils.utils import (
    check_isinstance,
    check_list_element,
    check_uint32,
    check_uint64,
)
from vllm_datadist_connector.llm_datadist.v1.tensor import Tensor, TensorDesc
from vllm_datadist_connector.llm_datadist.v2 import cache_keys as keys
from vllm_datadist_connector.llm_datadist.v2.cache_keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from vllm_datadist_connector.llm_datadist.v2.caches import CPU_CACHE_ID, CacheDesc, KvCache, Placement
from vllm_datadist_connector.llm_datadist.v2.interruptible import interruptible
from vllm_datadist_connector.llm_datadist.v2.llm_utils import (
    WHOLE,
    LayerSelection,
    check_block_ids,
    check_size,
    given,
    layer_span,
    require_blocks,
    require_contiguous,
)
from vllm_datadist_connector.llm_datadist.v2.manager_base import CacheManagerBase
from vllm_datadist_connector.llm_datadist.v2.transfer_configs import LayerSynchronizer, TransferConfig
from vllm_datadist_connector.llm_datadist.v2.transfer_task import CacheTask

LayerSpans: TypeAlias = "tuple[_native.LayerSpan | None, _native.LayerSpan | None]"
"""(of the source, of the destination)."""


class KvCacheManager(CacheManagerBase):
    """`LLMDataDist.kv_cache_manager` (LLM-DataDist Python: KvCacheManager).

    With several devices every cache has its tensors on each of them. Nobody here has devices, so they are parts of one
    cache of the engine: the tensors of device 0, then those of device 1, and so on.

    Errors of every call: TypeError for a wrong type, ValueError for an integer beyond its width, AttributeError for a
    cache or cache_desc that is None, RuntimeError after finalize, and LLMException, whose status_code is
    LLM_PARAM_INVALID unless another one is named; a call that the role does not allow is one.
    """

    _unfinished: ClassVar[LLMStatusCode] = LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT

    def __init__(self, native: _native.ManagedDataDist, cluster_id: int, role: LLMRole, device_count: int) -> None:
        super().__init__(native)
        self._cluster_id = cluster_id
        self._role = role
        self._device_count = device_count

    def is_initialized(self) -> bool:
        """False once LLMDataDist is finalized."""
        return self._initialized

    def allocate_cache(self, cache_desc: CacheDesc, cache_keys: Sequence[CacheKey] = ()) -> KvCache:
        """A contiguous DEVICE cache; `cache_keys[i]` (role PROMPT only) names row i, one without any id skips its row.

        The memory is free again once the cache is deallocated and every key is pulled or removed; a prefix key is not
        used up by pulls. A key given twice or bound already: LLM_PARAM_INVALID. LLM_DEVICE_OUT_OF_MEMORY: the pool is
        exhausted. Source: LLM-DataDist Python, KvCacheManager.allocate_cache.
        """
        self._engine()
        desc = given("cache_desc", cache_desc, CacheDesc)
        check_list_element("cache_keys", cache_keys, CacheKey, allow_none=False)
        if cache_keys:
            self._require_role("cache_keys", LLMRole.PROMPT)
        return self._allocate(desc, keys.row_keys(cache_keys), is_blocks_cache=False)

    def allocate_blocks_cache(self, cache_desc: CacheDesc, blocks_cache_key: BlocksCacheKey | None = None) -> KvCache:
        """A DEVICE blocks cache; `blocks_cache_key` (not in role DECODER) names it.

        Errors as allocate_cache. Source: LLM-DataDist Python, KvCacheManager.allocate_blocks_cache.
        """
        self._engine()
        desc = given("cache_desc", cache_desc, CacheDesc)
        check_isinstance("blocks_cache_key", blocks_cache_key, BlocksCacheKey)
        if blocks_cache_key is None:
            return self._allocate(desc, [], is_blocks_cache=True)
        self._require_role("blocks_cache_key", LLMRole.PROMPT, LLMRole.MIX)
        return self._allocate(desc, [keys.blocks_key(blocks_cache_key)], is_blocks_cache=True)

    def deallocate_cache(self, cache: KvCache) -> None:
        """Gives up the id of a cache; peers may still pull by the remaining keys of a contiguous one.

        `cache.per_device_tensor_addrs` is empty from then on. A cache that is freed already is ignored; one of
        create_cpu_cache is refused. Not to be called concurrently with other calls for the cache. Source: LLM-DataDist
        Python, KvCacheManager.deallocate_cache.
        """
        engine = self._engine()
        cache = given("cache", cache, KvCache)
        if cache.cache_id == CPU_CACHE_ID:
            raise param_invalid("cache", cache, "a cache that this manager allocated")
        raise_on_failure(engine.deallocate_cache(cache.cache_id), "deallocate_cache")
        cache.forget_addresses()

    def remove_cache_key(self, cache_key: CacheKey) -> None:
        """Unbinds the key of a row; role PROMPT. Pulls by it get LLM_KV_CACHE_NOT_EXIST; an unknown key is ignored.

        Source: LLM-DataDist Python, KvCacheManager.remove_cache_key.
        """
        engine = self._engine()
        self._require_role("remove_cache_key", LLMRole.PROMPT)
        check_isinstance("cache_key", cache_key, CacheKey, allow_none=False)
        raise_on_failure(engine.remove_cache_key(keys.removable_key(cache_key)), "remove_cache_key")

    @interruptible
    def pull_cache(
        self,
        cache_key: CacheKey | CacheKeyByIdAndIndex,
        kv_cache: KvCache,
        batch_index: int = 0,
        size: int = WHOLE,
        **kwargs: Any,
    ) -> None:
        """Reads one row of a prompt's contiguous cache into row `batch_index` (uint32) of ours; role DECODER.

        size: bytes per tensor; -1: one of our rows less dst_cache_offset. Keywords: src_cache_offset, dst_cache_offset
        (bytes into the row, ValueError below 0), src_layer_range, dst_layer_range (range, step 1, of each device;
        with several devices the prompt's cache has as many layers as ours), tensor_num_per_layer (uint32, default 2);
        others are ignored. A req_id is consumed once every tensor was pulled by it. LLM_KV_CACHE_NOT_EXIST,
        LLM_NOT_YET_LINK, LLM_TIMEOUT. Source: LLM-DataDist Python, KvCacheManager.pull_cache.
        """
        engine = self._engine()
        self._require_role("pull_cache", LLMRole.DECODER)
        check_isinstance("cache_key", cache_key, (CacheKey, CacheKeyByIdAndIndex), allow_none=False)
        require_contiguous("kv_cache", given("kv_cache", kv_cache, KvCache))
        check_uint32("batch_index", batch_index)
        check_size(size)
        src_offset, dst_offset = kwargs.get("src_cache_offset", 0), kwargs.get("dst_cache_offset", 0)
        check_uint64("src_cache_offset", src_offset)
        check_uint64("dst_cache_offset", dst_offset)
        layers = LayerSelection.from_kwargs(kwargs)
        src, src_batch_index = keys.cache_reference(cache_key)
        for src_span, dst_span in self._spans_of_devices(kv_cache.cache_desc, layers):
            status = engine.pull_rows(
                cache_key.cluster_id,
                src,
                kv_cache.cache_id,
                src_batch_index,
                batch_index,
                size,
                src_span,
                dst_span,
                layers.tensor_num_per_layer,
                src_offset,
                dst_offset,
            )
            raise_on_failure(status, "pull_cache", f"from {cache_key}")

    @interruptible
    def pull_blocks(
        self,
        prompt_cache_key: BlocksCacheKey,
        decoder_kv_cache: KvCache,
        prompt_blocks: Sequence[int],
        decoder_blocks: Sequence[int],
        **kwargs: Any,
    ) -> None:
        """Reads prompt_blocks[i] of a prompt's blocks cache into our decoder_blocks[i], in list order; role DECODER.

        Keywords: src_layer_range, dst_layer_range, tensor_num_per_layer, as those of pull_cache; errors as its. Source:
        LLM-DataDist Python, KvCacheManager.pull_blocks.
        """
        engine = self._engine()
        self._require_role("pull_blocks", LLMRole.DECODER)
        check_isinstance("prompt_cache_key", prompt_cache_key, BlocksCacheKey, allow_none=False)
        require_blocks("decoder_kv_cache", given("decoder_kv_cache", decoder_kv_cache, KvCache))
        check_block_ids("prompt_blocks", prompt_blocks, allow_empty=False)
        check_block_ids("decoder_blocks", decoder_blocks, allow_empty=False)
        if len(prompt_blocks) != len(decoder_blocks):
            allowed = f"{len(prompt_blocks)}, as many as prompt_blocks"
            raise param_invalid("len(decoder_blocks)", len(decoder_blocks), allowed)
        layers = LayerSelection.from_kwargs(kwargs)
        src, src_batch_index = keys.cache_reference(prompt_cache_key)
        for src_span, dst_span in self._spans_of_devices(decoder_kv_cache.cache_desc, layers):
            status = engine.pull_blocks(
                prompt_cache_key.cluster_id,
                src,
                decoder_kv_cache.cache_id,
                prompt_blocks,
                decoder_blocks,
                src_batch_index,
                src_span,
                dst_span,
                layers.tensor_num_per_layer,
            )
            raise_on_failure(status, "pull_blocks", f"from {prompt_cache_key}")

    def get_cache_tensors(self, cache: KvCache, tensor_index: int = 0) -> list[Tensor]:
        """Tensor `tensor_index` (uint32) of a cache, one Tensor per device, over its memory.

        LLM_KV_CACHE_NOT_EXIST: the cache is deallocated. Source: LLM-DataDist Python, KvCacheManager.get_cache_tensors.
        """
        self._engine()
        cache = given("cache", cache, KvCache)
        check_uint32("tensor_index", tensor_index)
        desc = cache.cache_desc
        if tensor_index >= desc.num_tensors:
            raise param_invalid("tensor_index", tensor_index, f"[0, {desc.num_tensors - 1}]")
        if not cache.per_device_tensor_addrs:
            raise failure(LLMStatusCode.LLM_KV_CACHE_NOT_EXIST, f"cache: {cache!r} is deallocated")
        tensor_desc = TensorDesc(desc.data_type, desc.shape)
        return [Tensor.at_address(addrs[tensor_index], tensor_desc, cache) for addrs in cache.per_device_tensor_addrs]

    def transfer_cache_async(
        self,
        src_cache: KvCache,
        layer_synchronizer: LayerSynchronizer,
        transfer_configs: Sequence[TransferConfig],
        src_block_indices: Sequence[int] | None = None,
        dst_block_indices: Sequence[int] | None = None,
        dst_block_memory_size: int | None = None,
    ) -> CacheTask:
        """Pushes layers to the addresses of all configs, each as soon as the synchronizer lets it; role PROMPT.

        As CacheManager.transfer_cache_async with TransferConfig; with several devices dst_addrs are those of device 0,
        then those of device 1, and so on. Source: LLM-DataDist Python, KvCacheManager.transfer_cache_async.
        """
        self._engine()
        self._require_role("transfer_cache_async", LLMRole.PROMPT)
        cache = given("src_cache", src_cache, KvCache)
        blocks = (src_block_indices, dst_block_indices, dst_block_memory_size)
        return self._start_transfer(
            cache, layer_synchronizer, transfer_configs, TransferConfig, blocks, self._device_count
        )

    def release_abandoned(self, cache_id: int) -> None:
        """Called when a KvCache that was not deallocated is garbage collected, where nobody could handle an error."""
        if self._initialized:
            self._native.deallocate_cache(cache_id)

    def _set_role(self, role: LLMRole) -> None:
        self._role = role

    def _require_role(self, what: str, *allowed: LLMRole) -> None:
        if self._role not in allowed:
            names = " or ".join(str(role) for role in allowed)
            raise param_invalid(f"role of {what}", str(self._role), names)

    def _allocate(self, desc: CacheDesc, native_keys: Sequence[_native.Key | None], is_blocks_cache: bool) -> KvCache:
        if desc.placement != Placement.DEVICE:
            raise param_invalid("cache_desc.placement", desc.placement, str(Placement.DEVICE))
        if desc.num_tensors == 0:
            raise param_invalid("cache_desc.num_tensors", 0, "above 0")
        status, cache_id, addrs = self._engine().allocate_cache(
            _native.CACHE_BLOCKS if is_blocks_cache else _native.CACHE_CONTIGUOUS,
            desc.num_tensors * self._device_count,
            desc.shape,
            desc.data_type.value,
            desc.placement.value,
            native_keys,
        )
        if status == LLMStatusCode.LLM_OUT_OF_MEMORY:  # the word of this generation, for which programs wait
            status = LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY
        raise_on_failure(status, "allocate_blocks_cache" if is_blocks_cache else "allocate_cache")
        per_device = [addrs[first : first + desc.num_tensors] for first in range(0, len(addrs), desc.num_tensors)]
        return KvCache(cache_id, desc, per_device, is_blocks_cache, owner=self)

    def _spans_of_devices(self, desc: CacheDesc, layers: LayerSelection) -> list[LayerSpans]:
        """The pulls that make up one over all devices: a layer range counts within each of them."""
        if self._device_count == 1 or (layers.src is None and layers.dst is None):
            return [(layer_span(layers.src), layer_span(layers.dst))]
        if desc.num_tensors % layers.tensor_num_per_layer != 0:
            allowed = f"a divisor of num_tensors {desc.num_tensors}: layer ranges count within each device"
            raise param_invalid("tensor_num_per_layer", layers.tensor_num_per_layer, allowed)
        ours = desc.num_tensors // layers.tensor_num_per_layer
        dst = range(ours) if layers.dst is None else layers.dst
        src, theirs = (range(len(dst)), len(dst)) if layers.src is None else (layers.src, ours)
        for name, selected, count in (("src_layer_range", src, theirs), ("dst_layer_range", dst, ours)):
            if selected.stop > count:
                raise param_invalid(name, selected, f"layers in [0, {count}), those of a device")
        return [
            (layer_span(src, device * theirs), layer_span(dst, device * ours)) for device in range(self._device_count)
        ]
