"""The legacy generation of the API (package `llm_datadist_v1`): KvCacheManager, and tensors over its caches."""

from __future__ import annotations

from vllm_datadist_connector.llm_datadist.v1.kv_cache_manager import KvCacheManager
from vllm_datadist_connector.llm_datadist.v1.tensor import Tensor, TensorDesc

__all__ = ["KvCacheManager", "Tensor", "TensorDesc"]
