"""LLM-DataDist's Python API on ordinary hosts: stands in for the package that scripts know as `llm_datadist`.

Importing it loads the native engine, but neither numpy nor torch nor vLLM; tensors are addresses here.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vllm_datadist_connector.llm_datadist.configs import LLMClusterInfo, LLMConfig, LlmConfig, LLMRole
from vllm_datadist_connector.llm_datadist.data_type import DataType
from vllm_datadist_connector.llm_datadist.status import LLMException, LLMStatusCode, Status
from vllm_datadist_connector.llm_datadist.v2.llm_datadist import LLMDataDist
from vllm_datadist_connector.llm_datadist.v2.llm_types import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    CacheTask,
    KvCache,
    LayerSynchronizer,
    MemInfo,
    Memtype,
    Placement,
    RegisterMemStatus,
    TransferConfig,
    TransferWithCacheKeyConfig,
)

if TYPE_CHECKING:
    from vllm_datadist_connector.llm_datadist.v1 import KvCacheManager, Tensor, TensorDesc

__all__ = [  # noqa: RUF022 - the documented order
    "LLMClusterInfo",
    "LLMStatusCode",
    "LLMException",
    "LLMRole",
    "LlmConfig",
    "LLMConfig",
    "DataType",
    "Status",
    "CacheDesc",
    "CacheKey",
    "CacheKeyByIdAndIndex",
    "KvCache",
    "Cache",
    "BlocksCacheKey",
    "LLMDataDist",
    "Placement",
    "RegisterMemStatus",
    "LayerSynchronizer",
    "TransferConfig",
    "CacheTask",
    "TransferWithCacheKeyConfig",
    "Memtype",
    "MemInfo",
    "TensorDesc",
    "Tensor",
    "KvCacheManager",
]

v2_list = __all__[:-3]

os.environ.setdefault("AUTO_USE_UC_MEMORY", "0")


def __getattr__(name: str) -> Any:
    """The names of the legacy package, resolved when they are asked for."""
    if name not in ("TensorDesc", "Tensor", "KvCacheManager"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm_datadist_connector.llm_datadist import v1

    return getattr(v1, name)
