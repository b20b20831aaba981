"""How a cache is named: by a key of the user's choice, or by cache id and row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from vllm_datadist_connector import _native
from vllm_datadist_connector.llm_datadist.status import param_invalid
from vllm_datadist_connector.llm_datadist.utils.utils import (
    ValueObject,
    check_int64,
    check_isinstance,
    check_uint32,
    check_uint64,
)

INVALID_ID: Final = 2**64 - 1
"""A request or prefix id that names nothing."""


def _bind(owner: str, fields: Mapping[str, int | None], args: Sequence[int], given: Mapping[str, int]) -> list[int]:
    """The values of `fields` (name -> default, None: mandatory) in their order.

    LLM_PARAM_INVALID as an LLMException, not Python's own TypeError, is what the documentation says of a missing,
    unknown or repeated field. `prompt_cluster_id` is the older name of `cluster_id`.
    """
    names = list(fields)
    allowed = ", ".join(names) + " (or prompt_cluster_id for cluster_id)"
    if len(args) > len(names):
        raise param_invalid(owner, args, f"at most {len(names)} arguments: {allowed}")
    values = dict(zip(names, args, strict=False))
    for name, value in given.items():
        field = "cluster_id" if name == "prompt_cluster_id" else name
        if field not in fields:
            raise param_invalid(f"{owner}.{name}", value, allowed)
        if field in values:
            raise param_invalid(f"{owner}.{name}", value, f"{field} once")
        values[field] = value
    for field, default in fields.items():
        if field in values:
            continue
        if default is None:
            raise param_invalid(f"{owner}.{field}", None, "a value: it has no default")
        values[field] = default
    return [values[name] for name in names]


class CacheKey(ValueObject):
    """Names one row of a contiguous cache (LLM-DataDist Python: CacheKey).

    `CacheKey(cluster_id, req_id, model_id=0, prefix_id=2**64-1)`, by position or keyword; `prompt_cluster_id` may be
    said for `cluster_id`. All are uint64: TypeError, ValueError. LLMException (LLM_PARAM_INVALID) for a missing
    cluster_id or req_id, an unknown keyword or too many arguments.

    A pull takes a key with exactly one of req_id and prefix_id set (not 2**64-1). Where keys are bound to the rows of
    a cache, one with neither is a placeholder: it leaves its row without a key.
    """

    __slots__ = ("_cluster_id", "_model_id", "_prefix_id", "_req_id")

    def __init__(self, *args: int, **kwargs: int) -> None:
        fields = {"cluster_id": None, "req_id": None, "model_id": 0, "prefix_id": INVALID_ID}
        values = _bind("CacheKey", fields, args, kwargs)
        for name, value in zip(fields, values, strict=True):
            check_uint64(name, value)
        self._cluster_id, self._req_id, self._model_id, self._prefix_id = values

    @property
    def cluster_id(self) -> int:
        return self._cluster_id

    @property
    def prompt_cluster_id(self) -> int:
        return self._cluster_id

    @property
    def req_id(self) -> int:
        return self._req_id

    @property
    def model_id(self) -> int:
        return self._model_id

    @property
    def prefix_id(self) -> int:
        return self._prefix_id

    def _fields(self) -> tuple[object, ...]:
        return self._cluster_id, self._req_id, self._model_id, self._prefix_id

    def __repr__(self) -> str:
        return (
            f"CacheKey(cluster_id={self._cluster_id}, req_id={self._req_id}, model_id={self._model_id}, "
            f"prefix_id={self._prefix_id})"
        )


class BlocksCacheKey(ValueObject):
    """Names a whole blocks cache (LLM-DataDist Python: BlocksCacheKey).

    `BlocksCacheKey(cluster_id, model_id=0)`, by position or keyword; `prompt_cluster_id` may be said for `cluster_id`.
    TypeError for what is no int; that both fit uint64 is checked where the key is used. LLMException
    (LLM_PARAM_INVALID) for a missing cluster_id, an unknown keyword or too many arguments.
    """

    __slots__ = ("_cluster_id", "_model_id")

    def __init__(self, *args: int, **kwargs: int) -> None:
        fields = {"cluster_id": None, "model_id": 0}
        values = _bind("BlocksCacheKey", fields, args, kwargs)
        for name, value in zip(fields, values, strict=True):
            check_isinstance(name, value, int, allow_none=False)
        self._cluster_id, self._model_id = values

    @property
    def cluster_id(self) -> int:
        return self._cluster_id

    @property
    def prompt_cluster_id(self) -> int:
        return self._cluster_id

    @property
    def model_id(self) -> int:
        return self._model_id

    def _fields(self) -> tuple[object, ...]:
        return self._cluster_id, self._model_id

    def __repr__(self) -> str:
        return f"BlocksCacheKey(cluster_id={self._cluster_id}, model_id={self._model_id})"


class CacheKeyByIdAndIndex(ValueObject):
    """Names one row of a peer's cache by its cache id (LLM-DataDist Python: CacheKeyByIdAndIndex).

    cluster_id uint64, cache_id int64, batch_index uint32: TypeError, ValueError.
    """

    __slots__ = ("_batch_index", "_cache_id", "_cluster_id")

    def __init__(self, cluster_id: int, cache_id: int, batch_index: int = 0) -> None:
        check_uint64("cluster_id", cluster_id)
        check_int64("cache_id", cache_id)
        check_uint32("batch_index", batch_index)
        self._cluster_id = cluster_id
        self._cache_id = cache_id
        self._batch_index = batch_index

    @property
    def cluster_id(self) -> int:
        return self._cluster_id

    @property
    def cache_id(self) -> int:
        return self._cache_id

    @property
    def batch_index(self) -> int:
        return self._batch_index

    def _fields(self) -> tuple[object, ...]:
        return self._cluster_id, self._cache_id, self._batch_index

    def __repr__(self) -> str:
        return (
            f"CacheKeyByIdAndIndex(cluster_id={self._cluster_id}, cache_id={self._cache_id}, "
            f"batch_index={self._batch_index})"
        )


def check_cache_key(key: CacheKey) -> None:
    """LLMException (LLM_PARAM_INVALID) unless exactly one of req_id and prefix_id is set."""
    if (key.req_id == INVALID_ID) == (key.prefix_id == INVALID_ID):
        raise param_invalid("cache_key", key, f"exactly one of req_id and prefix_id other than {INVALID_ID}")


def named_key(key: CacheKey) -> _native.Key:
    """The engine's form of a key that names something; see check_cache_key."""
    check_cache_key(key)
    if key.req_id != INVALID_ID:
        return (_native.KEY_REQUEST, key.req_id, key.model_id)
    return (_native.KEY_PREFIX, key.prefix_id, key.model_id)


def removable_key(key: CacheKey) -> _native.Key:
    """The engine's form of a key that may name nothing: no cache has it then."""
    if key.req_id == key.prefix_id == INVALID_ID:
        return (_native.KEY_REQUEST, INVALID_ID, key.model_id)
    return named_key(key)


def row_keys(keys: Sequence[CacheKey]) -> list[_native.Key | None]:
    """The engine's form of the keys of rows 0, 1, ...; None for a placeholder."""
    return [None if key.req_id == key.prefix_id == INVALID_ID else named_key(key) for key in keys]


def blocks_key(key: BlocksCacheKey) -> _native.Key:
    """The engine's form; ValueError if model_id or cluster_id does not fit uint64."""
    check_uint64("cluster_id", key.cluster_id)
    check_uint64("model_id", key.model_id)
    return (_native.KEY_BLOCKS, 0, key.model_id)


def cache_reference(key: CacheKey | BlocksCacheKey | CacheKeyByIdAndIndex) -> tuple[_native.CacheRef, int]:
    """(how the engine is told the peer's cache, row of it). A CacheKey says its row itself."""
    if isinstance(key, CacheKeyByIdAndIndex):
        return key.cache_id, key.batch_index
    return (named_key(key) if isinstance(key, CacheKey) else blocks_key(key)), 0
