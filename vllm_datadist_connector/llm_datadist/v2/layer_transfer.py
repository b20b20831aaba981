"""What transfer_cache_async asks of the engine, worked out and checked before its first layer is ready."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from vllm_datadist_connector import _native
from vllm_datadist_connector.llm_datadist.status import param_invalid
from vllm_datadist_connector.llm_datadist.utils.utils import check_isinstance, check_list_element, check_uint64
from vllm_datadist_connector.llm_datadist.v2.cache_keys import cache_reference
from vllm_datadist_connector.llm_datadist.v2.caches import Cache
from vllm_datadist_connector.llm_datadist.v2.llm_utils import check_block_ids, check_pushed, given
from vllm_datadist_connector.llm_datadist.v2.transfer_configs import (
    LayerSynchronizer,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from vllm_datadist_connector.llm_datadist.v2.transfer_task import LayerPush

TENSORS_PER_LAYER: Final = 2
"""K and V: transfer_cache_async knows no other number."""

AnyTransferConfig = TransferConfig | TransferWithCacheKeyConfig


@dataclass(frozen=True)
class BlockLists:
    """Neither list: row to row. Both: block to block. dst only: row to blocks of dst_block_bytes each."""

    src: tuple[int, ...] = ()
    dst: tuple[int, ...] = ()
    dst_block_bytes: int = 0

    @classmethod
    def checked(
        cls, src: Sequence[int] | None, dst: Sequence[int] | None, dst_block_memory_size: int | None
    ) -> BlockLists:
        """From the arguments of transfer_cache_async; its errors."""
        for name, block_ids in (("src_block_indices", src), ("dst_block_indices", dst)):
            if block_ids is not None:
                check_block_ids(name, block_ids, allow_empty=True)
        if dst_block_memory_size is not None:
            check_uint64("dst_block_memory_size", dst_block_memory_size)
        if src and not dst:
            raise param_invalid("dst_block_indices", dst, "as many block indices as src_block_indices")
        if src and dst and len(src) != len(dst):
            allowed = f"{len(src)}, as many as src_block_indices"
            raise param_invalid("len(dst_block_indices)", len(dst), allowed)
        if dst and not src and not dst_block_memory_size:
            allowed = "the bytes of a destination block: src_block_indices are not given"
            raise param_invalid("dst_block_memory_size", dst_block_memory_size, allowed)
        if dst_block_memory_size and not dst:
            raise param_invalid("dst_block_memory_size", dst_block_memory_size, "None or 0 without dst_block_indices")
        return cls(tuple(src or ()), tuple(dst or ()), 0 if src else dst_block_memory_size or 0)


@dataclass(frozen=True)
class LayerSource:
    """Where the layers come from. The cache's tensors are device-major; a legacy manager's have several devices."""

    engine: _native.ManagedDataDist
    cache_id: int
    layers_per_device: int
    devices: int
    blocks: BlockLists


@dataclass(frozen=True)
class PushToAddresses:
    """Implements LayerPush for a TransferConfig."""

    source: LayerSource
    cluster_id: int
    layers: range
    addrs: tuple[int, ...]
    batch_index: int

    @property
    def destination(self) -> str:
        return f"addresses of cluster {self.cluster_id}"

    def push(self, layer: int) -> int:
        source = self.source
        for device in range(source.devices):
            first = (device * len(self.layers) + layer - self.layers.start) * TENSORS_PER_LAYER
            status = source.engine.push_layer_to_addrs(
                source.cache_id,
                device * source.layers_per_device + layer,
                self.cluster_id,
                self.addrs[first : first + TENSORS_PER_LAYER],
                self.batch_index,
                source.blocks.src,
                source.blocks.dst,
                source.blocks.dst_block_bytes,
            )
            if status != _native.LLM_SUCCESS:
                return status
        return _native.LLM_SUCCESS


@dataclass(frozen=True)
class PushToCache:
    """Implements LayerPush for a TransferWithCacheKeyConfig, which only the current manager takes: one device."""

    source: LayerSource
    cluster_id: int
    layers: range
    dst: _native.CacheRef
    dst_batch_index: int
    dst_layers: range
    batch_index: int

    @property
    def destination(self) -> str:
        return f"cache {self.dst} of cluster {self.cluster_id}"

    def push(self, layer: int) -> int:
        source = self.source
        return source.engine.push_layer(
            source.cache_id,
            layer,
            self.cluster_id,
            self.dst,
            self.dst_layers[layer - self.layers.start],
            self.batch_index,
            self.dst_batch_index,
            source.blocks.src,
            source.blocks.dst,
            source.blocks.dst_block_bytes,
            TENSORS_PER_LAYER,
        )


def check_source(src_cache: Cache | None, layer_synchronizer: LayerSynchronizer) -> Cache:
    cache = given("src_cache", src_cache, Cache)
    check_isinstance("layer_synchronizer", layer_synchronizer, LayerSynchronizer, allow_none=False)
    check_pushed("src_cache", cache)
    if cache.cache_desc.num_tensors % TENSORS_PER_LAYER != 0:
        raise param_invalid("src_cache.cache_desc.num_tensors", cache.cache_desc.num_tensors, "an even number")
    return cache


def check_configs(transfer_configs: Sequence[AnyTransferConfig], kind: type[AnyTransferConfig]) -> None:
    """TypeError unless a list or tuple of the kind of config that the manager's mode takes."""
    check_list_element("transfer_configs", transfer_configs, kind, allow_none=False)
    for config in transfer_configs:
        if isinstance(config, TransferWithCacheKeyConfig):
            config.check_consistent()


def plan_pushes(source: LayerSource, transfer_configs: Sequence[AnyTransferConfig]) -> list[LayerPush]:
    """One per config, which may change afterwards: LLMException (LLM_PARAM_INVALID) if one does not fit the source."""
    return [_plan_push(source, f"transfer_configs[{index}]", config) for index, config in enumerate(transfer_configs)]


def _plan_push(source: LayerSource, name: str, config: AnyTransferConfig) -> LayerPush:
    layers = config.src_layer_range if config.src_layer_range is not None else range(source.layers_per_device)
    if layers.stop > source.layers_per_device:
        raise param_invalid(f"{name}.src_layer_range", layers, f"layers in [0, {source.layers_per_device})")
    if source.blocks.src and config.src_batch_index != 0:
        raise param_invalid(f"{name}.src_batch_index", config.src_batch_index, "0 with src_block_indices")
    if isinstance(config, TransferWithCacheKeyConfig):
        dst, dst_batch_index = cache_reference(config.cache_key)
        return PushToCache(
            source, config.dst_cluster_id, layers, dst, dst_batch_index, config.dst_layer_range, config.src_batch_index
        )
    expected = len(layers) * TENSORS_PER_LAYER * source.devices
    if len(config.dst_addrs) != expected:
        allowed = f"{expected}: {TENSORS_PER_LAYER} for each of {len(layers)} layers"
        allowed += f" on each of {source.devices} devices" if source.devices > 1 else ""
        raise param_invalid(f"len({name}.dst_addrs)", len(config.dst_addrs), allowed)
    return PushToAddresses(source, config.dst_cluster_id, layers, tuple(config.dst_addrs), config.src_batch_index)
