"""The data types of the API, by the name that scripts import them from."""

from __future__ import annotations

from vllm_datadist_connector.llm_datadist.v2.cache_keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from vllm_datadist_connector.llm_datadist.v2.caches import Cache, CacheDesc, KvCache, Placement
from vllm_datadist_connector.llm_datadist.v2.memory import MemInfo, Memtype, RegisterMemStatus
from vllm_datadist_connector.llm_datadist.v2.transfer_configs import (
    LayerSynchronizer,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from vllm_datadist_connector.llm_datadist.v2.transfer_task import CacheTask

__all__ = [
    "BlocksCacheKey",
    "Cache",
    "CacheDesc",
    "CacheKey",
    "CacheKeyByIdAndIndex",
    "CacheTask",
    "KvCache",
    "LayerSynchronizer",
    "MemInfo",
    "Memtype",
    "Placement",
    "RegisterMemStatus",
    "TransferConfig",
    "TransferWithCacheKeyConfig",
]
