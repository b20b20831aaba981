"""What LLM-DataDist promises of caches, keys and pool memory, as a model without counts: all is derived from names.

A cache that was allocated lives while its id or one of its keys names it; one that was registered while it is so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from support.arenas import Arena
from support.transfer_oracle import Layout
from vllm_datadist_connector.llm_datadist import BlocksCacheKey, CacheKey, LLMStatusCode

NONE = 2**64 - 1
"""A request or prefix id that names nothing."""

Kind = Literal["request", "prefix", "blocks", "placeholder"]
OK = LLMStatusCode.LLM_SUCCESS
INVALID = LLMStatusCode.LLM_PARAM_INVALID
MISSING = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
EXHAUSTED = LLMStatusCode.LLM_OUT_OF_MEMORY


@dataclass(frozen=True)
class Key:
    kind: Kind
    id: int
    model: int

    def of_row(self, cluster_id: int) -> CacheKey:
        if self.kind == "prefix":
            return CacheKey(cluster_id, NONE, self.model, self.id)
        return CacheKey(cluster_id, self.id if self.kind == "request" else NONE, self.model)

    def of_blocks(self, cluster_id: int) -> BlocksCacheKey:
        return BlocksCacheKey(cluster_id, self.model)


@dataclass
class ModelCache:
    layout: Layout
    rows: int
    allocated: bool
    contents: Arena
    """[tensor][row or block, byte]."""
    id_is_valid: bool = True


@dataclass
class Binding:
    cache_id: int
    row: int
    pulled: set[int] = field(default_factory=set)
    """Tensors, by this key."""


class KeyModel:
    def __init__(self, tensors: int, pool_pages: int, consumes: bool) -> None:
        self._tensors = tensors
        self._pool_pages = pool_pages
        self._consumes = consumes
        self.caches: dict[int, ModelCache] = {}
        self.bound: dict[Key, Binding] = {}

    # ---- what can be seen ----

    def lives(self, cache_id: int) -> bool:
        return self.caches[cache_id].id_is_valid or any(b.cache_id == cache_id for b in self.bound.values())

    @property
    def free_pages(self) -> int:
        """Each tensor takes one."""
        living = [id_ for id_, cache in self.caches.items() if cache.allocated and self.lives(id_)]
        return self._pool_pages - self._tensors * len(living)

    def can_allocate(self, layout: Layout, rows: int, keys: Sequence[Key]) -> LLMStatusCode:
        named = [key for key in keys if key.kind != "placeholder"]
        if len(keys) > (rows if layout == "rows" else 1) or len(set(named)) < len(named):
            return INVALID
        if any(key in self.bound for key in named):
            return INVALID
        return OK if self._tensors <= self.free_pages else EXHAUSTED

    def can_register(self, layout: Layout, rows: int, keys: Sequence[Key]) -> LLMStatusCode:
        return OK if len(keys) <= (rows if layout == "rows" else 1) else INVALID

    # ---- what happens ----

    def add(self, cache_id: int, cache: ModelCache, keys: Sequence[Key]) -> None:
        """Of a request or prefix key the first owner stays, a blocks key goes to the last."""
        self.caches[cache_id] = cache
        for row, key in enumerate(keys):
            if key.kind == "blocks" or (key.kind != "placeholder" and key not in self.bound):
                self.bound[key] = Binding(cache_id, row)

    def deallocate(self, cache_id: int) -> None:
        cache = self.caches[cache_id]
        if cache.allocated:
            cache.id_is_valid = False
            if cache.layout == "blocks":
                self._unbind_all(cache_id)

    def unregister(self, cache_id: int) -> None:
        cache = self.caches[cache_id]
        if not cache.allocated:
            cache.id_is_valid = False
            self._unbind_all(cache_id)

    def remove_key(self, key: Key) -> None:
        self.bound.pop(key, None)

    def pulled(self, key: Key, tensors: Sequence[int]) -> None:
        """By this key; a request's of an allocated cache is used up once every tensor was pulled by it."""
        binding = self.bound[key]
        binding.pulled.update(tensors)
        allocated = self.caches[binding.cache_id].allocated
        if self._consumes and allocated and key.kind == "request" and len(binding.pulled) == self._tensors:
            self.remove_key(key)

    def _unbind_all(self, cache_id: int) -> None:
        self.bound = {key: binding for key, binding in self.bound.items() if binding.cache_id != cache_id}
