"""Element types of caches. The numpy tables are built on first use: importing this module does not import numpy."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np

    dtype_to_np_dtype: dict[DataType, type[np.generic]]
    valid_np_dtypes: tuple[type[np.generic], ...]
    np_dtype_to_dtype: dict[type[np.generic], DataType]


class DataType(Enum):
    """Element type of a tensor; values are the native numbers (LLM-DataDist Python: DataType)."""

    DT_FLOAT = 0
    DT_FLOAT16 = 1
    DT_BF16 = 27
    DT_INT8 = 2
    DT_INT16 = 6
    DT_UINT16 = 7
    DT_UINT8 = 4
    DT_INT32 = 3
    DT_INT64 = 9
    DT_UINT32 = 8
    DT_UINT64 = 10
    DT_BOOL = 12
    DT_DOUBLE = 11
    DT_STRING = 13


python_dtype_2_dwrapper_dtype: Final[dict[DataType, int]] = {data_type: data_type.value for data_type in DataType}
"""DataType to its native number."""


def get_python_dtype_from_wrapper_dtype(wrapper_dtype: int) -> DataType:
    """The DataType of a native number; ValueError for one that has none here."""
    return DataType(wrapper_dtype)


def _numpy_tables() -> dict[str, Any]:
    """The tables are keyed by numpy's scalar types: `np_dtype_to_dtype[array.dtype.type]`."""
    import numpy as np

    exact: dict[DataType, type[np.generic]] = {
        DataType.DT_FLOAT: np.float32,
        DataType.DT_FLOAT16: np.float16,
        DataType.DT_INT8: np.int8,
        DataType.DT_INT16: np.int16,
        DataType.DT_UINT16: np.uint16,
        DataType.DT_UINT8: np.uint8,
        DataType.DT_INT32: np.int32,
        DataType.DT_INT64: np.int64,
        DataType.DT_UINT32: np.uint32,
        DataType.DT_UINT64: np.uint64,
        DataType.DT_BOOL: np.bool_,
        DataType.DT_DOUBLE: np.float64,
        DataType.DT_STRING: np.bytes_,
    }
    return {
        # numpy has no bfloat16: float16 has its width, not its values.
        "dtype_to_np_dtype": {**exact, DataType.DT_BF16: np.float16},
        "valid_np_dtypes": tuple(exact.values()),
        "np_dtype_to_dtype": {np_dtype: data_type for data_type, np_dtype in exact.items()},
    }


def __getattr__(name: str) -> Any:
    if name not in ("dtype_to_np_dtype", "valid_np_dtypes", "np_dtype_to_dtype"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    tables = _numpy_tables()
    globals().update(tables)
    return tables[name]
