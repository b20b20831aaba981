"""DataType and its tables."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from vllm_datadist_connector.llm_datadist import DataType, data_type

DOCUMENTED = {
    "DT_FLOAT": 0,
    "DT_FLOAT16": 1,
    "DT_BF16": 27,
    "DT_INT8": 2,
    "DT_INT16": 6,
    "DT_UINT16": 7,
    "DT_UINT8": 4,
    "DT_INT32": 3,
    "DT_INT64": 9,
    "DT_UINT32": 8,
    "DT_UINT64": 10,
    "DT_BOOL": 12,
    "DT_DOUBLE": 11,
    "DT_STRING": 13,
}


def test_values() -> None:
    assert {kind.name: kind.value for kind in DataType} == DOCUMENTED
    assert data_type.python_dtype_2_dwrapper_dtype == {DataType[name]: value for name, value in DOCUMENTED.items()}


def test_from_native_number() -> None:
    for kind in DataType:
        assert data_type.get_python_dtype_from_wrapper_dtype(kind.value) is kind
    with pytest.raises(ValueError, match="28"):
        data_type.get_python_dtype_from_wrapper_dtype(28)


def test_numpy_tables() -> None:
    assert data_type.dtype_to_np_dtype.keys() == set(DataType)
    assert data_type.dtype_to_np_dtype[DataType.DT_BF16] is np.float16
    assert data_type.dtype_to_np_dtype[DataType.DT_STRING] is np.bytes_
    assert data_type.np_dtype_to_dtype[np.float16] is DataType.DT_FLOAT16
    for np_dtype in data_type.valid_np_dtypes:
        assert data_type.dtype_to_np_dtype[data_type.np_dtype_to_dtype[np_dtype]] is np_dtype
    assert len(data_type.valid_np_dtypes) == len(DataType) - 1


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no_such_table"):
        data_type.no_such_table  # noqa: B018


def test_numpy_is_imported_on_first_use() -> None:
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys\n"
            "from vllm_datadist_connector.llm_datadist import data_type\n"
            "assert 'numpy' not in sys.modules\n"
            "data_type.valid_np_dtypes\n"
            "assert 'numpy' in sys.modules\n",
        ],
        check=True,
    )
