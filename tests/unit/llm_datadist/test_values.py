"""Objects that only say something: equal where they say the same, and keys of a dict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vllm_datadist_connector.llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LLMStatusCode,
    MemInfo,
    Memtype,
    Placement,
    Status,
    TensorDesc,
)

DEVICE, HOST = Memtype.MEM_TYPE_DEVICE, Memtype.MEM_TYPE_HOST


@pytest.mark.parametrize(
    ("kind", "same", "others"),
    [
        (CacheKey, (1, 2, 3, 4), [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)]),
        (BlocksCacheKey, (1, 2), [(0, 2), (1, 0)]),
        (CacheKeyByIdAndIndex, (1, 2, 3), [(0, 2, 3), (1, 0, 3), (1, 2, 0)]),
        (MemInfo, (DEVICE, 1, 2), [(HOST, 1, 2), (DEVICE, 0, 2), (DEVICE, 1, 0)]),
        (TensorDesc, (DataType.DT_INT8, [1, 2]), [(DataType.DT_UINT8, [1, 2]), (DataType.DT_INT8, [2, 2])]),
        (Status, (LLMStatusCode.LLM_FAILED,), [(LLMStatusCode.LLM_SUCCESS,)]),
        (
            CacheDesc,
            (2, [4, 8], DataType.DT_INT8, Placement.HOST, 1, 0, "ND"),
            [
                (3, [4, 8], DataType.DT_INT8, Placement.HOST, 1, 0, "ND"),
                (2, [5, 8], DataType.DT_INT8, Placement.HOST, 1, 0, "ND"),
                (2, [4, 8], DataType.DT_UINT8, Placement.HOST, 1, 0, "ND"),
                (2, [4, 8], DataType.DT_INT8, Placement.DEVICE, 1, 0, "ND"),
                (2, [4, 8], DataType.DT_INT8, Placement.HOST, 0, 0, "ND"),
                (2, [4, 8], DataType.DT_INT8, Placement.HOST, 1, 1, "ND"),
                (2, [4, 8], DataType.DT_INT8, Placement.HOST, 1, 0, "NZ"),
            ],
        ),
    ],
)
def test_compare_and_hash(kind: Callable[..., Any], same: tuple[Any, ...], others: list[tuple[Any, ...]]) -> None:
    assert kind(*same) == kind(*same)
    assert hash(kind(*same)) == hash(kind(*same))
    assert len({kind(*values) for values in [same, *others, same]}) == 1 + len(others)
    assert kind(*same) != object()


def test_keys_of_different_kinds_differ() -> None:
    assert BlocksCacheKey(1, 2) != CacheKeyByIdAndIndex(1, 2)


def test_a_description_that_changes_stays_where_it_is_in_a_dict() -> None:
    desc = CacheDesc(1, [4, 8], DataType.DT_INT8)
    found = {desc: "here"}
    desc.update_dim(0, 5)
    assert found[desc] == "here"
    assert desc != CacheDesc(1, [4, 8], DataType.DT_INT8)
