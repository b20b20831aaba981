"""What the bindings take and refuse. Where an effect must be seen, two endpoints of this process are linked."""

from __future__ import annotations

import array
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.endpoints import Endpoint, copy_blocks

from vllm_datadist_connector import _native


class Index:
    """An int by __index__, as numpy scalars are."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


def _read_only(ids: list[int]) -> memoryview:
    return memoryview(array.array("q", ids)).toreadonly()


BLOCK_ID_FORMS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "array_q": lambda ids: array.array("q", ids),
    "array_Q": lambda ids: array.array("Q", ids),
    "numpy_int64": lambda ids: np.array(ids, dtype=np.int64),
    "numpy_uint64": lambda ids: np.array(ids, dtype=np.uint64),
    "numpy_little_endian": lambda ids: np.array(ids, dtype="<i8"),
    "read_only": _read_only,
    "numpy_scalars": lambda ids: [np.int32(i) for i in ids],
    "index_objects": lambda ids: [Index(i) for i in ids],
}

WRONG_TYPES: dict[str, Any] = {
    "int": 3,
    "none": None,
    "str": "12",
    "bytes": b"\0" * 16,
    "set": {1, 2},
    "floats": [1.0, 2.0],
    "numpy_int32": np.array([1, 2], dtype=np.int32),
    "numpy_float64": np.array([1, 2], dtype=np.float64),
    "numpy_big_endian": np.array([1, 2], dtype=">i8"),
    "numpy_two_dimensions": np.array([[1, 2]], dtype=np.int64),
    "numpy_strided": np.array([1, 0, 2, 0], dtype=np.int64)[::2],
}

NO_BLOCK = {
    "list": [0, -1],
    "tuple": (0, -1),
    "array": array.array("q", [0, -1]),
    "numpy": np.array([0, -1], dtype=np.int64),
    "too_large": [0, 2**63],
    "too_small": [0, -(2**70)],
}


@pytest.fixture
def pair(make_endpoint: Callable[..., Endpoint]) -> tuple[Endpoint, Endpoint]:
    mine, other = make_endpoint(cluster_id=1), make_endpoint(cluster_id=2)
    mine.link(other)
    return mine, other


@pytest.fixture
def bare() -> _native.LlmDataDist:
    """Not initialised: calls that get past the bindings return LLM_FAILED."""
    return _native.LlmDataDist(1, 1)


@pytest.mark.parametrize("form", BLOCK_ID_FORMS)
def test_every_form_of_block_ids_names_the_same_blocks(pair: tuple[Endpoint, Endpoint], form: str) -> None:
    mine, other = pair
    src, dst = [5, 6, 0, 31], [1, 2, 30, 3]
    expected = mine.read_memory()
    copy_blocks(other.memory, expected, src, dst)
    assert mine.pull(other, BLOCK_ID_FORMS[form](src), BLOCK_ID_FORMS[form](dst)) == _native.LLM_SUCCESS
    np.testing.assert_array_equal(mine.memory, expected)


@pytest.mark.parametrize("form", WRONG_TYPES)
def test_other_types_of_block_ids_raise(bare: _native.LlmDataDist, form: str) -> None:
    with pytest.raises(TypeError):
        bare.pull_kv_blocks(2, 1, 1, WRONG_TYPES[form], [0, 1])
    with pytest.raises(TypeError):
        bare.push_kv_blocks(1, 2, 1, [0, 1], WRONG_TYPES[form], 4)


@pytest.mark.parametrize("form", NO_BLOCK)
def test_ids_that_no_block_can_have_are_refused(bare: _native.LlmDataDist, form: str) -> None:
    assert bare.pull_kv_blocks(2, 1, 1, NO_BLOCK[form], [0, 1]) == _native.LLM_PARAM_INVALID
    assert _native.last_error().startswith("src_blocks[1] is ")
    assert bare.push_kv_blocks(1, 2, 1, [0, 1], NO_BLOCK[form], 4) == _native.LLM_PARAM_INVALID
    assert _native.last_error().startswith("dst_blocks[1] is ")


def test_ids_beyond_the_signed_range_are_left_to_the_engine(pair: tuple[Endpoint, Endpoint]) -> None:
    mine, other = pair
    status = mine.pull(other, np.array([2**64 - 1], dtype=np.uint64), [0])
    assert status == _native.LLM_PARAM_INVALID


def test_a_list_that_shrinks_while_it_is_read_is_harmless(bare: _native.LlmDataDist) -> None:
    ids: list[Any] = [0] * 1000

    class Shrinking:
        def __index__(self) -> int:
            ids.clear()
            return 0

    ids[0] = Shrinking()
    assert bare.pull_kv_blocks(2, 1, 1, ids, [0]) == _native.LLM_FAILED


def test_an_error_raised_by_an_element_comes_through(bare: _native.LlmDataDist) -> None:
    class Failing:
        def __index__(self) -> int:
            raise LookupError("no index")

    with pytest.raises(LookupError, match="no index"):
        bare.pull_kv_blocks(2, 1, 1, [Failing()], [0])


def test_numbers_that_the_api_cannot_hold_raise(bare: _native.LlmDataDist) -> None:
    with pytest.raises(TypeError):
        bare.pull_kv_blocks(-1, 1, 1, [0], [0])
    with pytest.raises(TypeError):
        bare.pull_kv_blocks(2**64, 1, 1, [0], [0])
    with pytest.raises(TypeError):
        bare.pull_kv_blocks(1, 1, 1, [0], [0], tensor_num_per_layer=256)
    with pytest.raises(TypeError):
        bare.pull_kv_blocks(1, 1, 1, [0], [0], (0, 2**31))


def test_providers_are_listed_and_named_in_errors() -> None:
    assert _native.providers() == ["engine"]
    assert _native.LlmDataDist(5, 2).provider == "engine"
    assert _native.LlmDataDist(2**64 - 1, 2).cluster_id == 2**64 - 1
    with pytest.raises(ValueError, match=r"^provider is 'npu'; available here: 'engine'$"):
        _native.LlmDataDist(5, 2, "npu")
    with pytest.raises(ValueError, match=r"^CANN's LLM-DataDist is not here: .*DATADIST_CANN_LIBRARY"):
        _native.LlmDataDist(5, 2, "cann")


def test_calls_before_initialize_fail_with_a_reason(bare: _native.LlmDataDist) -> None:
    assert bare.register_kv_cache([2, 4], 4, [4096]) == (_native.LLM_FAILED, -1)
    assert _native.last_error()
    assert bare.listen_port() == (_native.LLM_FAILED, 0)
    status, statuses = bare.link_clusters([_native.ClusterInfo(2, [("127.0.0.1", 1)], [("127.0.0.1", 0)])])
    assert (status, statuses) == (_native.LLM_FAILED, [])
    bare.finalize()
    assert _native.last_error() == ""


def test_last_error_belongs_to_its_thread(bare: _native.LlmDataDist) -> None:
    assert bare.pull_kv_blocks(2, 1, 1, [-1], [0]) == _native.LLM_PARAM_INVALID
    seen: list[str] = []
    thread = threading.Thread(target=lambda: seen.append(_native.last_error()))
    thread.start()
    thread.join()
    assert seen == [""]
    assert _native.last_error()


@pytest.mark.parametrize("data_type", [28, -1, 1000])
def test_data_types_without_a_size_are_refused(make_endpoint: Callable[..., Endpoint], data_type: int) -> None:
    endpoint = make_endpoint(cluster_id=1)
    status, cache_id = endpoint.datadist.register_kv_cache([2, 4], data_type, [endpoint.memory.ctypes.data])
    assert (status, cache_id) == (_native.LLM_PARAM_INVALID, -1)


def test_cluster_info_checks_what_it_is_given() -> None:
    info = _native.ClusterInfo(7, [("127.0.0.1", 80)])
    assert (info.remote_cluster_id, info.remote_role_type) == (7, 0)
    assert info.remote_ip_infos == [("127.0.0.1", 80)]
    assert info.local_ip_infos == []
    with pytest.raises(TypeError, match=r"remote_ip_infos is .*65536"):
        _native.ClusterInfo(7, [("127.0.0.1", 65536)])
    with pytest.raises(TypeError, match="local_ip_infos"):
        _native.ClusterInfo(7, [], [80])


def test_lists_of_a_cluster_info_can_be_changed_in_place(bare: _native.LlmDataDist) -> None:
    info = _native.ClusterInfo(7)
    info.remote_ip_infos.append(("127.0.0.1", -1))
    assert info.remote_ip_infos == [("127.0.0.1", -1)]
    with pytest.raises(TypeError, match=r"remote_ip_infos is .*-1"):
        bare.link_clusters([info])
