"""Cache keys: their constructors, and what the engine is told of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vllm_datadist_connector import _native
from vllm_datadist_connector.llm_datadist.status import LLMException, LLMStatusCode
from vllm_datadist_connector.llm_datadist.v2 import cache_keys
from vllm_datadist_connector.llm_datadist.v2.cache_keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex

NONE = 2**64 - 1


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((1, 2), {}, (1, 2, 0, NONE)),
        ((1, 2, 3), {}, (1, 2, 3, NONE)),
        ((1, 2, 3, 4), {}, (1, 2, 3, 4)),
        ((1,), {"req_id": 2}, (1, 2, 0, NONE)),
        ((), {"cluster_id": 1, "req_id": 2}, (1, 2, 0, NONE)),
        ((), {"prompt_cluster_id": 1, "req_id": NONE, "prefix_id": 5, "model_id": 6}, (1, NONE, 6, 5)),
        ((True, 2), {}, (1, 2, 0, NONE)),
    ],
)
def test_cache_key(args: tuple[int, ...], kwargs: dict[str, int], expected: tuple[int, ...]) -> None:
    key = CacheKey(*args, **kwargs)
    assert (key.cluster_id, key.req_id, key.model_id, key.prefix_id) == expected
    assert key.prompt_cluster_id == key.cluster_id


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (CacheKey, "CacheKey.cluster_id: None"),
        (lambda: CacheKey(1), "CacheKey.req_id: None"),
        (lambda: CacheKey(req_id=2), "CacheKey.cluster_id: None"),
        (lambda: CacheKey(1, 2, block=3), "CacheKey.block: 3"),
        (lambda: CacheKey(1, 2, cluster_id=3), "CacheKey.cluster_id: 3, allowed: cluster_id once"),
        (lambda: CacheKey(1, 2, prompt_cluster_id=3), "CacheKey.prompt_cluster_id: 3, allowed: cluster_id once"),
        (lambda: CacheKey(prompt_cluster_id=1, cluster_id=1, req_id=2), "allowed: cluster_id once"),
        (lambda: CacheKey(1, 2, 3, 4, 5), "at most 4 arguments"),
        (BlocksCacheKey, "BlocksCacheKey.cluster_id: None"),
        (lambda: BlocksCacheKey(1, req_id=2), "BlocksCacheKey.req_id: 2"),
        (lambda: BlocksCacheKey(1, 2, 3), "at most 2 arguments"),
    ],
)
def test_fields_that_do_not_bind(make: Callable[[], object], named: str) -> None:
    with pytest.raises(LLMException) as caught:
        make()
    assert caught.value.status_code == LLMStatusCode.LLM_PARAM_INVALID
    assert named in str(caught.value)


@pytest.mark.parametrize("field", ["cluster_id", "req_id", "model_id", "prefix_id"])
@pytest.mark.parametrize(
    ("value", "error"), [("1", TypeError), (None, TypeError), (-1, ValueError), (2**64, ValueError)]
)
def test_cache_key_fields_are_uint64(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=field):
        CacheKey(**({"cluster_id": 1, "req_id": 2} | {field: value}))


def test_blocks_cache_key() -> None:
    key = BlocksCacheKey(prompt_cluster_id=3, model_id=4)
    assert (key.cluster_id, key.prompt_cluster_id, key.model_id) == (3, 3, 4)
    assert BlocksCacheKey(3).model_id == 0
    with pytest.raises(TypeError, match="model_id"):
        BlocksCacheKey(3, "4")  # type: ignore[arg-type]


@pytest.mark.parametrize("key", [BlocksCacheKey(-1), BlocksCacheKey(1, 2**64)])
def test_width_of_a_blocks_cache_key_is_checked_on_use(key: BlocksCacheKey) -> None:
    with pytest.raises(ValueError, match="out of range"):
        cache_keys.cache_reference(key)


@pytest.mark.parametrize(
    ("args", "error", "named"),
    [
        ((-1, 1), ValueError, "cluster_id"),
        ((1, 2**63), ValueError, "cache_id"),
        ((1, 1, 2**32), ValueError, "batch_index"),
        ((1, "1"), TypeError, "cache_id"),
        ((1, 1, None), TypeError, "batch_index"),
    ],
)
def test_cache_key_by_id_and_index_fields(args: tuple[Any, ...], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        CacheKeyByIdAndIndex(*args)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (CacheKey(1, 2, 3), ((_native.KEY_REQUEST, 2, 3), 0)),
        (CacheKey(1, NONE, 3, 4), ((_native.KEY_PREFIX, 4, 3), 0)),
        (BlocksCacheKey(1, 9), ((_native.KEY_BLOCKS, 0, 9), 0)),
        (CacheKeyByIdAndIndex(1, -5, 6), (-5, 6)),
        (CacheKeyByIdAndIndex(1, 5), (5, 0)),
    ],
)
def test_what_the_engine_is_told(
    key: CacheKey | BlocksCacheKey | CacheKeyByIdAndIndex, expected: tuple[_native.CacheRef, int]
) -> None:
    assert cache_keys.cache_reference(key) == expected


def test_placeholders_leave_their_row_without_a_key() -> None:
    keys = [CacheKey(1, 0), CacheKey(1, NONE), CacheKey(1, NONE, 5, 7)]
    assert cache_keys.row_keys(keys) == [(_native.KEY_REQUEST, 0, 0), None, (_native.KEY_PREFIX, 7, 5)]


@pytest.mark.parametrize("key", [CacheKey(1, NONE), CacheKey(1, 2, 0, 3)])
def test_a_pull_needs_exactly_one_id(key: CacheKey) -> None:
    with pytest.raises(LLMException, match="exactly one of req_id and prefix_id") as caught:
        cache_keys.cache_reference(key)
    assert caught.value.status_code == LLMStatusCode.LLM_PARAM_INVALID
