"""Tensors of the legacy API: a cache's memory, or data of the caller's, as numpy arrays. numpy is imported on use."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_datadist_connector import _native
from vllm_datadist_connector.llm_datadist import data_type
from vllm_datadist_connector.llm_datadist.data_type import DataType
from vllm_datadist_connector.llm_datadist.status import param_invalid, raise_on_failure
from vllm_datadist_connector.llm_datadist.utils.utils import (
    ValueObject,
    check_int64,
    check_isinstance,
    check_list_element,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class TensorDesc(ValueObject):
    """Element type and shape, int64 (LLM-DataDist Python: TensorDesc). TypeError, ValueError."""

    def __init__(self, dtype: DataType, shape: Sequence[int]) -> None:
        check_isinstance("dtype", dtype, DataType, allow_none=False)
        check_list_element("shape", shape, int, allow_none=False)
        for index, dim in enumerate(shape):
            check_int64(f"shape[{index}]", dim)
        self._dtype = dtype
        self._shape = list(shape)

    @property
    def dtype(self) -> DataType:
        return self._dtype

    @property
    def shape(self) -> list[int]:
        return list(self._shape)

    def _fields(self) -> tuple[object, ...]:
        return self._dtype, *self._shape

    def __repr__(self) -> str:
        return f"TensorDesc({self._dtype}, {self._shape})"


class Tensor:
    """An array with a TensorDesc (LLM-DataDist Python: Tensor).

    `data`: anything numpy makes an array of, which is shared where its type and shape allow it. Without `tensor_desc`
    its type must be one of data_type.valid_np_dtypes (TypeError); with one it is converted and reshaped to it, and
    LLMException (LLM_PARAM_INVALID) says that this cannot be done. DT_BF16 takes floats, or its bits as uint16.
    """

    def __init__(self, data: Any, tensor_desc: TensorDesc | None = None) -> None:
        check_isinstance("tensor_desc", tensor_desc, TensorDesc)
        self._stored, self._desc = (
            _described(data) if tensor_desc is None else (_stored(data, tensor_desc), tensor_desc)
        )

    @classmethod
    def at_address(cls, address: int, tensor_desc: TensorDesc, owner: object) -> Tensor:
        """The memory at `address`, as memory_as_array has it."""
        tensor = cls.__new__(cls)
        tensor._stored = memory_as_array(address, tensor_desc, owner)
        tensor._desc = tensor_desc
        return tensor

    @property
    def desc(self) -> TensorDesc:
        return self._desc

    def numpy(self, copy: bool = False) -> npt.NDArray[Any]:
        """The array itself, or a copy of it. DT_BF16, which numpy does not have, is always a copy as float32.

        The array of a cache is a view of its memory: not to be used after the cache is deallocated.
        """
        check_isinstance("copy", copy, bool, allow_none=False)
        if self._desc.dtype == DataType.DT_BF16:
            return _bf16_to_float32(self._stored)
        return self._stored.copy() if copy else self._stored

    def __repr__(self) -> str:
        return f"Tensor({self._desc.dtype}, {self._desc.shape})"


def _described(data: Any) -> tuple[npt.NDArray[Any], TensorDesc]:
    import numpy as np

    array = np.asarray(data)
    dtype = data_type.np_dtype_to_dtype.get(array.dtype.type)
    if dtype is None:
        names = ", ".join(kind.__name__ for kind in data_type.valid_np_dtypes)
        raise TypeError(f"data: an array of {array.dtype}, only support {names}")
    return array, TensorDesc(dtype, array.shape)


def _stored(data: Any, desc: TensorDesc) -> npt.NDArray[Any]:
    """`data` in the form in which `desc` is stored."""
    import numpy as np

    array = np.asarray(data)
    try:
        if desc.dtype != DataType.DT_BF16:
            array = array.astype(data_type.dtype_to_np_dtype[desc.dtype], copy=False)
        elif array.dtype != np.uint16:
            array = _float32_to_bf16(array.astype(np.float32))
        return array.reshape(desc.shape)
    except ValueError as error:
        raise param_invalid("data", f"{array.dtype}{list(array.shape)}", f"what {desc!r} can hold ({error})") from None


def memory_as_array(address: int, desc: TensorDesc, owner: object) -> npt.NDArray[Any]:
    """The memory at `address`, which `owner` holds: it lives as long as an array of it does. DT_BF16 as uint16.

    LLMException (LLM_PARAM_INVALID): DT_STRING, which has no such form in numpy, or a shape without a size.
    """
    import numpy as np

    status, size = _native.tensor_bytes(desc.shape, desc.dtype.value)
    raise_on_failure(status, "Tensor", repr(desc))
    memory: Any = (ctypes.c_ubyte * size).from_address(address)
    memory.owner = owner  # numpy keeps what it was made of
    if desc.dtype == DataType.DT_STRING:
        raise param_invalid("tensor_desc.dtype", desc.dtype, "an element type of a fixed width")
    stored: type[np.generic] = np.uint16 if desc.dtype == DataType.DT_BF16 else data_type.dtype_to_np_dtype[desc.dtype]
    return np.frombuffer(memory, dtype=stored).reshape(desc.shape)


def _bf16_to_float32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """A bfloat16 is the upper half of a float32."""
    import numpy as np

    return (bits.astype(np.uint32) << 16).view(np.float32)


def _float32_to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Rounded to nearest, ties to even; a NaN stays one, which rounding its payload could make an infinity."""
    import numpy as np

    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
