"""What transfer_cache_async is told: when a layer may be read, and where it goes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from vllm_datadist_connector.llm_datadist.status import param_invalid
from vllm_datadist_connector.llm_datadist.utils.utils import (
    check_isinstance,
    check_list_element,
    check_uint32,
    check_uint64,
)
from vllm_datadist_connector.llm_datadist.v2.cache_keys import BlocksCacheKey, CacheKeyByIdAndIndex
from vllm_datadist_connector.llm_datadist.v2.llm_utils import check_layer_range


class LayerSynchronizer(ABC):
    """Says when a layer has been computed (LLM-DataDist Python: LayerSynchronizer)."""

    @abstractmethod
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        """Waits until layer `layer_index` may be read. False ends the task: its transfers get LLM_PARAM_INVALID."""


class TransferConfig:
    """Pushes layers to addresses of a peer; two-sided mode (LLM-DataDist Python: TransferConfig).

    dst_cluster_id uint64; dst_addrs list or tuple of uint64, two per layer of src_layer_range (None: of the cache), in
    the order of the layers; src_batch_index uint32. TypeError, ValueError; LLMException (LLM_PARAM_INVALID) for a range
    that is empty or has a step.
    """

    def __init__(
        self,
        dst_cluster_id: int,
        dst_addrs: Sequence[int],
        src_layer_range: range | None = None,
        src_batch_index: int = 0,
    ) -> None:
        self.dst_cluster_id = dst_cluster_id
        self.dst_addrs = dst_addrs
        self.src_layer_range = src_layer_range
        self.src_batch_index = src_batch_index
        self.dst_layer_range: None = None

    @property
    def dst_cluster_id(self) -> int:
        return self._dst_cluster_id

    @dst_cluster_id.setter
    def dst_cluster_id(self, dst_cluster_id: int) -> None:
        check_uint64("dst_cluster_id", dst_cluster_id)
        self._dst_cluster_id = dst_cluster_id

    @property
    def dst_addrs(self) -> Sequence[int]:
        return self._dst_addrs

    @dst_addrs.setter
    def dst_addrs(self, dst_addrs: Sequence[int]) -> None:
        check_list_element("dst_addrs", dst_addrs, int, allow_none=False)
        for index, addr in enumerate(dst_addrs):
            check_uint64(f"dst_addrs[{index}]", addr)
        self._dst_addrs = list(dst_addrs)

    @property
    def src_layer_range(self) -> range | None:
        return self._src_layer_range

    @src_layer_range.setter
    def src_layer_range(self, src_layer_range: range | None) -> None:
        check_layer_range("src_layer_range", src_layer_range, allow_none=True)
        self._src_layer_range = src_layer_range

    @property
    def src_batch_index(self) -> int:
        return self._src_batch_index

    @src_batch_index.setter
    def src_batch_index(self, src_batch_index: int) -> None:
        check_uint32("src_batch_index", src_batch_index)
        self._src_batch_index = src_batch_index


class TransferWithCacheKeyConfig:
    """Pushes layers to a cache of a peer; remote-accessible mode (LLM-DataDist Python: TransferWithCacheKeyConfig).

    Layer i of src_layer_range goes to layer i of dst_layer_range, counted within the ranges. src_batch_index uint32, 0
    with a BlocksCacheKey. TypeError, ValueError; LLMException (LLM_PARAM_INVALID) for a range that is empty or has a
    step, for ranges of different lengths and for a row of a blocks cache: what several fields decide together is
    checked at construction and when the config is used, since setters change one at a time.
    """

    def __init__(
        self,
        cache_key: BlocksCacheKey | CacheKeyByIdAndIndex,
        src_layer_range: range,
        dst_layer_range: range,
        src_batch_index: int = 0,
    ) -> None:
        self.cache_key = cache_key
        self.src_layer_range = src_layer_range
        self.dst_layer_range = dst_layer_range
        self.src_batch_index = src_batch_index
        self.check_consistent()

    def check_consistent(self) -> None:
        """LLMException (LLM_PARAM_INVALID) if the fields contradict each other."""
        if len(self._src_layer_range) != len(self._dst_layer_range):
            allowed = f"as many layers as src_layer_range {self._src_layer_range}"
            raise param_invalid("dst_layer_range", self._dst_layer_range, allowed)
        if isinstance(self._cache_key, BlocksCacheKey) and self._src_batch_index != 0:
            raise param_invalid("src_batch_index", self._src_batch_index, "0 with a BlocksCacheKey")

    @property
    def dst_cluster_id(self) -> int:
        """Always the cache key's."""
        return self._cache_key.cluster_id

    @property
    def cache_key(self) -> BlocksCacheKey | CacheKeyByIdAndIndex:
        return self._cache_key

    @cache_key.setter
    def cache_key(self, cache_key: BlocksCacheKey | CacheKeyByIdAndIndex) -> None:
        check_isinstance("cache_key", cache_key, (BlocksCacheKey, CacheKeyByIdAndIndex), allow_none=False)
        self._cache_key = cache_key

    @property
    def src_layer_range(self) -> range:
        return self._src_layer_range

    @src_layer_range.setter
    def src_layer_range(self, src_layer_range: range) -> None:
        check_layer_range("src_layer_range", src_layer_range, allow_none=False)
        self._src_layer_range = src_layer_range

    @property
    def dst_layer_range(self) -> range:
        return self._dst_layer_range

    @dst_layer_range.setter
    def dst_layer_range(self, dst_layer_range: range) -> None:
        check_layer_range("dst_layer_range", dst_layer_range, allow_none=False)
        self._dst_layer_range = dst_layer_range

    @property
    def src_batch_index(self) -> int:
        return self._src_batch_index

    @src_batch_index.setter
    def src_batch_index(self, src_batch_index: int) -> None:
        check_uint32("src_batch_index", src_batch_index)
        self._src_batch_index = src_batch_index
