"""Tensor: views of memory, conversions, and who keeps the memory."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from vllm_datadist_connector.llm_datadist.data_type import DataType
from vllm_datadist_connector.llm_datadist.status import LLMException, LLMStatusCode
from vllm_datadist_connector.llm_datadist.v1.tensor import Tensor, TensorDesc


class Owner:
    """Of some memory; can be referenced weakly."""

    def __init__(self, memory: np.ndarray[Any, Any]) -> None:
        self.memory = memory


def at_address(memory: np.ndarray[Any, Any], dtype: DataType, shape: list[int]) -> Tensor:
    return Tensor.at_address(memory.ctypes.data, TensorDesc(dtype, shape), Owner(memory))


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"),
    [
        (DataType.DT_FLOAT, np.float32),
        (DataType.DT_FLOAT16, np.float16),
        (DataType.DT_INT8, np.int8),
        (DataType.DT_INT16, np.int16),
        (DataType.DT_UINT16, np.uint16),
        (DataType.DT_UINT8, np.uint8),
        (DataType.DT_INT32, np.int32),
        (DataType.DT_INT64, np.int64),
        (DataType.DT_UINT32, np.uint32),
        (DataType.DT_UINT64, np.uint64),
        (DataType.DT_BOOL, np.bool_),
        (DataType.DT_DOUBLE, np.float64),
    ],
)
def test_a_tensor_at_an_address_is_a_view(dtype: DataType, numpy_dtype: type[np.generic]) -> None:
    memory = np.array([[0, 1, 0], [1, 1, 0]], numpy_dtype)
    array = at_address(memory, dtype, [2, 3]).numpy()
    assert array.dtype == numpy_dtype
    array[0, 0] = 1
    assert memory[0, 0] == 1
    copy = at_address(memory, dtype, [2, 3]).numpy(copy=True)
    copy[0, 0] = 0
    assert memory[0, 0] == 1


def test_the_array_keeps_the_owner_of_the_memory() -> None:
    owner = Owner(np.arange(4, dtype=np.int32))
    alive = weakref.ref(owner)
    array = Tensor.at_address(owner.memory.ctypes.data, TensorDesc(DataType.DT_INT32, [4]), owner).numpy()
    del owner
    gc.collect()
    assert alive() is not None
    assert array.tolist() == [0, 1, 2, 3]
    del array
    gc.collect()
    assert alive() is None


def test_bfloat16_becomes_float32() -> None:
    values = np.array([1.0, -2.5, 0.0, 3.140625, np.inf], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    array = at_address(bits, DataType.DT_BF16, [5]).numpy()
    assert array.dtype == np.float32
    assert array.tolist() == values.tolist()
    array[0] = 9
    assert at_address(bits, DataType.DT_BF16, [5]).numpy()[0] == 1


def test_floats_round_to_the_nearest_bfloat16() -> None:
    ulp = 2.0**-7  # of 1.0
    values = [1 + 0.4 * ulp, 1 + 0.6 * ulp, 1 + 0.5 * ulp, 1 + 1.5 * ulp, float("nan"), float("-inf"), -0.0]
    rounded = Tensor(values, TensorDesc(DataType.DT_BF16, [7])).numpy()
    np.testing.assert_array_equal(rounded, [1, 1 + ulp, 1, 1 + 2 * ulp, np.nan, -np.inf, -0.0])
    payload = np.array([0x7FFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(Tensor(payload, TensorDesc(DataType.DT_BF16, [1])).numpy()[0])
    bits = np.array([[0x3F80]], np.uint16)
    assert Tensor(bits, TensorDesc(DataType.DT_BF16, [1])).numpy().tolist() == [1.0]


def test_data_of_the_callers() -> None:
    data = np.arange(6, dtype=np.int16).reshape(2, 3)
    tensor = Tensor(data)
    assert (tensor.desc.dtype, tensor.desc.shape) == (DataType.DT_INT16, [2, 3])
    assert np.shares_memory(tensor.numpy(), data)
    assert not np.shares_memory(tensor.numpy(copy=True), data)
    reshaped = Tensor([[1, 2, 3], [4, 5, 6]], TensorDesc(DataType.DT_FLOAT, (3, 2))).numpy()
    assert reshaped.dtype == np.float32
    assert reshaped.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert Tensor(np.array([b"ab", b"c"])).desc.dtype == DataType.DT_STRING


def test_refusals() -> None:
    with pytest.raises(TypeError, match="complex128, only support float32"):
        Tensor(np.array([1j]))
    with pytest.raises(TypeError, match="tensor_desc"):
        Tensor([1], DataType.DT_INT8)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="copy"):
        Tensor([1.0]).numpy(copy=1)  # type: ignore[arg-type]
    with pytest.raises(LLMException, match=r"data: .*\[3\].*TensorDesc") as caught:
        Tensor([1, 2, 3], TensorDesc(DataType.DT_INT8, [2, 2]))
    assert caught.value.status_code == LLMStatusCode.LLM_PARAM_INVALID
    with pytest.raises(LLMException):
        Tensor.at_address(4096, TensorDesc(DataType.DT_STRING, [2]), None)
    with pytest.raises(LLMException):
        Tensor.at_address(4096, TensorDesc(DataType.DT_INT8, [0]), None)


@pytest.mark.parametrize(
    ("dtype", "shape", "error"),
    [(4, [1], TypeError), (DataType.DT_INT8, 1, TypeError), (DataType.DT_INT8, [2**63], ValueError)],
)
def test_tensor_desc_refuses(dtype: Any, shape: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        TensorDesc(dtype, shape)
