"""A cache's memory as numpy's and torch's arrays."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from vllm_datadist_connector.llm_datadist import CacheDesc, DataType, LLMException, LLMStatusCode
from vllm_datadist_connector.llm_datadist.v2.caches import Cache
from vllm_datadist_connector.llm_datadist.views import numpy_view, torch_view


def cache_over(memory: np.ndarray[Any, Any], data_type: DataType) -> Cache:
    """Two tensors, one after the other."""
    desc = CacheDesc(2, memory.shape[1:], data_type)
    return Cache(1, desc, [tensor.ctypes.data for tensor in memory], is_blocks_cache=False)


def test_views_are_the_memory_itself() -> None:
    memory = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    cache = cache_over(memory, DataType.DT_FLOAT)
    assert np.array_equal(numpy_view(cache), memory[0])
    numpy_view(cache, 1)[2, 3] = -1
    assert memory[1, 2, 3] == -1
    torch_view(cache, 1)[0, 0] = -2
    assert memory[1, 0, 0] == -2
    assert torch_view(cache).dtype == torch.float32


def test_bfloat16_is_torchs_own() -> None:
    memory = np.zeros((2, 4), dtype=np.uint16)
    cache = cache_over(memory, DataType.DT_BF16)
    torch_view(cache, 1)[:] = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.bfloat16)
    assert memory[1].tolist() == [0x3F80, 0xC000, 0x3F00, 0x4040]
    assert numpy_view(cache, 1).dtype == np.uint16


def test_views_hold_their_cache() -> None:
    """Whose memory may be given back once nobody has it."""
    memory = np.zeros((2, 4), dtype=np.int8)
    cache = cache_over(memory, DataType.DT_INT8)
    held = weakref.ref(cache)
    views = [numpy_view(cache), torch_view(cache)]
    del cache
    gc.collect()
    assert held() is not None
    views.clear()
    gc.collect()
    assert held() is None


def test_refusals() -> None:
    cache = cache_over(np.zeros((2, 4), dtype=np.int8), DataType.DT_INT8)
    for view in (numpy_view, torch_view):
        with pytest.raises(LLMException, match=r"tensor_index: 2, allowed: \[0, 1\]"):
            view(cache, 2)
        with pytest.raises(ValueError, match="tensor_index"):
            view(cache, -1)
        with pytest.raises(TypeError, match="cache"):
            view(None)  # type: ignore[arg-type]
    cache.forget_addresses()
    with pytest.raises(LLMException) as caught:
        numpy_view(cache)
    assert caught.value.status_code == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
