"""The memory of a cache as arrays: ours, not LLM-DataDist's, whose caches lie on devices.

Nothing is copied. An array must not be used any more once its cache is deallocated, or the memory that was registered
is gone. numpy and torch are imported on use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_datadist_connector.llm_datadist.data_type import DataType
from vllm_datadist_connector.llm_datadist.status import LLMStatusCode, failure, param_invalid
from vllm_datadist_connector.llm_datadist.utils.utils import check_isinstance, check_uint32
from vllm_datadist_connector.llm_datadist.v1.tensor import TensorDesc, memory_as_array
from vllm_datadist_connector.llm_datadist.v2.caches import Cache

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch


def numpy_view(cache: Cache, tensor_index: int = 0) -> npt.NDArray[Any]:
    """Tensor `tensor_index` (uint32) of a cache in its shape; DT_BF16, which numpy does not have, as uint16.

    TypeError, ValueError; LLMException: LLM_PARAM_INVALID (no such tensor, DT_STRING), LLM_KV_CACHE_NOT_EXIST (the
    cache is deallocated).
    """
    check_isinstance("cache", cache, Cache, allow_none=False)
    check_uint32("tensor_index", tensor_index)
    addrs = cache.tensor_addrs
    if not addrs:
        raise failure(LLMStatusCode.LLM_KV_CACHE_NOT_EXIST, f"cache: {cache!r} is deallocated")
    if tensor_index >= len(addrs):
        raise param_invalid("tensor_index", tensor_index, f"[0, {len(addrs) - 1}]")
    desc = TensorDesc(cache.cache_desc.data_type, cache.cache_desc.shape)
    return memory_as_array(addrs[tensor_index], desc, cache)


def torch_view(cache: Cache, tensor_index: int = 0) -> torch.Tensor:
    """As numpy_view, but DT_BF16 as torch.bfloat16."""
    import torch

    array = numpy_view(cache, tensor_index)
    if cache.cache_desc.data_type == DataType.DT_BF16:
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)
