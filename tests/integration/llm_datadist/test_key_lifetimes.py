"""Which caches can be pulled, by which name, with which bytes, and how much pool memory is free: against a model.

Allocations, registrations, keys and pulls in any order, on one manager whose peer is itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from support.arenas import OURS, PEER, Arena, link_with_itself, managed, view
from support.key_model import INVALID, MISSING, NONE, OK, Key, KeyModel, ModelCache
from support.transfer_oracle import Layout

from vllm_datadist_connector import _native
from vllm_datadist_connector.llm_datadist import (
    Cache,
    CacheDesc,
    CacheKeyByIdAndIndex,
    DataType,
    LLMException,
    LLMStatusCode,
    Placement,
)
from vllm_datadist_connector.llm_datadist.v2.cache_manager import CacheManager

TENSORS, ROW_BYTES = 4, 24
POOL_PAGES = 22  # of 1 KiB, one for each tensor: five caches and a rest
EXHAUSTED = LLMStatusCode.LLM_OUT_OF_MEMORY

ROW_KEYS = [Key("request", id_, model) for id_ in (1, 2) for model in (0, 1)] + [
    Key("prefix", id_, 0) for id_ in (1, 2)
]
PLACEHOLDER = Key("placeholder", NONE, 0)
BLOCKS_KEYS = [Key("blocks", 0, model) for model in (0, 1)]

row_keys = st.lists(st.sampled_from([*ROW_KEYS, PLACEHOLDER]), max_size=3)
blocks_keys = st.lists(st.sampled_from(BLOCKS_KEYS), max_size=1)
rows_of_caches = st.integers(1, 3)
selections = st.sampled_from(
    [(None, 2)]
    + [
        (range(start, stop), per_layer)
        for per_layer in (1, 2)
        for start in range(TENSORS // per_layer)
        for stop in range(start + 1, TENSORS // per_layer + 1)
    ]
)
"""(layers, tensors per layer), the layers of both sides."""


def outcome(call: Callable[[], object]) -> LLMStatusCode:
    try:
        call()
    except LLMException as error:
        return error.status_code
    return OK


class KeyLifetimes(RuleBasedStateMachine):
    remote_accessible = False

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        mode = "1" if self.remote_accessible else "0"
        pool = f'{{"memory_size": {POOL_PAGES << 10}, "page_shift": 10}}'
        options = {"llm.EnableRemoteCacheAccessible": mode, "llm.MemPoolConfig": pool}
        # The limit of registered addresses is no part of the model.
        options |= {"datadist.Transport": "local", "datadist.MaxRegisteredAddrs": "1000000"}
        self.engine = self.stack.enter_context(managed(options))
        link_with_itself(self.engine)
        self.manager = CacheManager(
            self.engine, OURS, remote_accessible=self.remote_accessible, pools=frozenset({Placement.DEVICE})
        )
        self.model = KeyModel(TENSORS, POOL_PAGES, consumes=not self.remote_accessible)
        self.handles: dict[int, Cache] = {}
        self.addrs: dict[int, list[int]] = {}
        self.arenas: list[Arena] = []
        self.seed = 0
        self.dst = Arena(0, TENSORS, 1, ROW_BYTES)
        self.dst_blocks = Arena(0, TENSORS, 1, ROW_BYTES)
        desc = self._desc(1)
        self.into = self.manager.register_cache(desc, self.dst.addrs)
        self.into_blocks = self.manager.register_blocks_cache(desc, self.dst_blocks.addrs)

    def teardown(self) -> None:
        try:
            for key in [key for key in self.model.bound if key.kind != "blocks"]:
                self.pull_by_key(key, (None, 2), -1)
        finally:
            self.stack.close()

    # ---- caches ----

    @rule(rows=rows_of_caches, keys=row_keys)
    def allocate(self, rows: int, keys: list[Key]) -> None:
        named = [key.of_row(OURS) for key in keys]
        self._make("rows", rows, keys, lambda: self.manager.allocate_cache(self._desc(rows), named))

    @rule(rows=rows_of_caches, keys=blocks_keys)
    def allocate_blocks(self, rows: int, keys: list[Key]) -> None:
        named = keys[0].of_blocks(OURS) if keys else None
        self._make("blocks", rows, keys, lambda: self.manager.allocate_blocks_cache(self._desc(rows), named))

    @rule(rows=rows_of_caches, keys=row_keys)
    def register(self, rows: int, keys: list[Key]) -> None:
        named, arena = [key.of_row(OURS) for key in keys], self._arena(rows)
        self._make("rows", rows, keys, lambda: self.manager.register_cache(arena.desc(), arena.addrs, named), arena)

    @rule(rows=rows_of_caches, keys=blocks_keys)
    def register_blocks(self, rows: int, keys: list[Key]) -> None:
        named, arena = keys[0].of_blocks(OURS) if keys else None, self._arena(rows)
        do = lambda: self.manager.register_blocks_cache(arena.desc(), arena.addrs, named)  # noqa: E731
        self._make("blocks", rows, keys, do, arena)

    def _make(
        self, layout: Layout, rows: int, keys: list[Key], call: Callable[[], Cache], arena: Arena | None = None
    ) -> None:
        judge = self.model.can_register if arena is not None else self.model.can_allocate
        expected = judge(layout, rows, keys)
        try:
            cache = call()
        except LLMException as error:
            assert error.status_code == expected, error  # noqa: PT017  what is allowed must not raise either
            return
        assert expected == OK
        assert cache.cache_id not in self.model.caches
        contents = arena or self._arena(rows)
        if arena is None:
            for tensor, memory in enumerate(view(cache.tensor_addrs, rows, ROW_BYTES)):
                memory[:] = contents[tensor]
        self.model.add(cache.cache_id, ModelCache(layout, rows, arena is None, contents.copy()), keys)
        self.handles[cache.cache_id], self.addrs[cache.cache_id] = cache, list(cache.tensor_addrs)

    @rule(which=st.integers(0, 7))
    def deallocate(self, which: int) -> None:
        """Also once more, and of a cache that was registered: nothing happens."""
        for cache_id in self._chosen(which):
            cache = self.handles[cache_id]
            (self.manager.deallocate_blocks_cache if cache.is_blocks_cache else self.manager.deallocate_cache)(cache)
            assert cache.tensor_addrs == []
            self.model.deallocate(cache_id)

    @rule(which=st.integers(0, 7))
    def unregister(self, which: int) -> None:
        """Also once more, and of a cache that was allocated: nothing happens."""
        for cache_id in self._chosen(which):
            self.manager.unregister_cache(cache_id)
            self.model.unregister(cache_id)

    @rule(key=st.sampled_from([*ROW_KEYS, PLACEHOLDER]))
    def remove_cache_key(self, key: Key) -> None:
        self.manager.remove_cache_key(key.of_row(OURS))
        self.model.remove_key(key)

    # ---- pulls ----

    @rule(
        key=st.sampled_from(ROW_KEYS),
        selection=selections,
        size=st.sampled_from([-1, ROW_BYTES, 5]),
        times=st.sampled_from([1, 1, 2]),
    )
    def pull_by_key(self, key: Key, selection: tuple[range | None, int], size: int, times: int = 1) -> None:
        """Also twice: the same layers again are no others."""
        for _ in range(times):
            if self.remote_accessible:
                # The Python API pulls by key to blocks only in this mode.
                self.pull_pieces_by_key(key, selection)
                continue
            pull = partial(self.manager.pull_cache, key.of_row(PEER), self.into, 0, size, **_layers(selection))
            self._pull(pull, key, selection, self.dst, size)

    @rule(key=st.sampled_from(ROW_KEYS), selection=selections)
    def pull_pieces_by_key(self, key: Key, selection: tuple[range | None, int]) -> None:
        named = key.of_row(PEER)
        do = lambda: self.manager.pull_blocks(named, self.into_blocks, [], [0], **_layers(selection))  # noqa: E731
        self._pull(do, key, selection, self.dst_blocks)

    @rule(key=st.sampled_from(BLOCKS_KEYS), block=st.integers(0, 2))
    def pull_blocks_by_key(self, key: Key, block: int) -> None:
        do = lambda: self.manager.pull_blocks(key.of_blocks(PEER), self.into_blocks, [block], [0])  # noqa: E731
        binding = self.model.bound.get(key)
        if binding is None:
            assert outcome(do) == MISSING
        elif block >= self.model.caches[binding.cache_id].rows:
            assert outcome(do) == INVALID
        else:
            do()
            self._expect(self.dst_blocks, binding.cache_id, block, range(TENSORS))

    @rule(which=st.integers(0, 7), row=st.integers(0, 2))
    def pull_by_id(self, which: int, row: int) -> None:
        for cache_id in self._chosen(which):
            cache = self.model.caches[cache_id]
            key = CacheKeyByIdAndIndex(PEER, cache_id, row)
            status = outcome(partial(self.manager.pull_cache, key, self.into))
            if not cache.id_is_valid:
                assert status == MISSING
            elif cache.layout == "blocks" or row >= cache.rows:
                assert status == INVALID
            else:
                assert status == OK
                self._expect(self.dst, cache_id, row, range(TENSORS))

    def _pull(
        self,
        call: Callable[[], None],
        key: Key,
        selection: tuple[range | None, int],
        dst: Arena,
        size: int = -1,
    ) -> None:
        binding = self.model.bound.get(key)
        if binding is None:
            assert outcome(call) == MISSING
            return
        call()
        layers, per_layer = selection
        tensors = range(TENSORS) if layers is None else range(layers.start * per_layer, layers.stop * per_layer)
        self._expect(dst, binding.cache_id, binding.row, tensors, size)
        self.model.pulled(key, tensors)

    def _expect(self, dst: Arena, cache_id: int, row: int, tensors: Sequence[int], size: int = -1) -> None:
        """What was pulled, and nothing else, is in `dst`, which is blank afterwards."""
        expected = Arena(0, TENSORS, 1, ROW_BYTES)
        for tensor in tensors:
            length = ROW_BYTES if size == -1 else size
            expected[tensor][0, :length] = self.model.caches[cache_id].contents[tensor][row, :length]
        assert dst == expected
        for tensor in range(TENSORS):
            dst[tensor][:] = Arena(0, TENSORS, 1, ROW_BYTES)[tensor]

    # ---- after every step ----

    @invariant()
    def every_name_is_known_or_not(self) -> None:
        """A pull of more than a row names a cache without pulling from it."""
        too_much = ROW_BYTES + 1
        for key in ROW_KEYS:
            native = (_native.KEY_REQUEST if key.kind == "request" else _native.KEY_PREFIX, key.id, key.model)
            status = self.engine.pull_rows(PEER, native, self.into.cache_id, 0, 0, -1, None, None, 2, too_much)
            assert status == (INVALID if key in self.model.bound else MISSING), key
        for key in BLOCKS_KEYS:
            native = (_native.KEY_BLOCKS, 0, key.model)
            status = self.engine.pull_blocks(PEER, native, self.into_blocks.cache_id, [9], [0])
            assert status == (INVALID if key in self.model.bound else MISSING), key
        for cache_id, cache in self.model.caches.items():
            status = self.engine.pull_rows(PEER, cache_id, self.into.cache_id, 9)
            assert status == (INVALID if cache.id_is_valid else MISSING), cache_id
        # The owner lets go of a cache that it has described just after the answer: this one comes when it has.
        unknown = (_native.KEY_REQUEST, 99, 0)
        assert self.engine.pull_rows(PEER, unknown, self.into.cache_id) == MISSING

    @invariant()
    def what_is_alive_keeps_its_bytes(self) -> None:
        for cache_id, cache in self.model.caches.items():
            if cache.id_is_valid:
                seen = view(self.addrs[cache_id], cache.rows, ROW_BYTES)
                assert all(np.array_equal(seen[tensor], cache.contents[tensor]) for tensor in range(TENSORS))

    @invariant()
    def as_much_of_the_pool_is_free_as_no_name_holds(self) -> None:
        free = self.model.free_pages
        if free > 0:
            self.manager.deallocate_cache(self.manager.allocate_cache(self._desc(1, free)))
        too_much = self._desc(1, free + 1)
        assert outcome(lambda: self.manager.allocate_cache(too_much)) == EXHAUSTED

    # ---- small helpers ----

    def _chosen(self, which: int) -> list[int]:
        """The which-th youngest cache, dead or alive."""
        return list(self.model.caches)[::-1][which : which + 1]

    def _desc(self, rows: int, tensors: int = TENSORS) -> CacheDesc:
        return CacheDesc(tensors, [rows, ROW_BYTES], DataType.DT_UINT8)

    def _arena(self, rows: int) -> Arena:
        self.seed += 1
        self.arenas.append(Arena(self.seed, TENSORS, rows, ROW_BYTES))  # registered memory outlives its cache
        return self.arenas[-1]


class KeyLifetimesRemoteAccessible(KeyLifetimes):
    remote_accessible = True


def _layers(selection: tuple[range | None, int]) -> dict[str, object]:
    layers, per_layer = selection
    return {"src_layer_range": layers, "dst_layer_range": layers, "tensor_num_per_layer": per_layer}


_SETTINGS = settings(max_examples=40, stateful_step_count=40, deadline=None)

TestTwoSided = KeyLifetimes.TestCase
TestTwoSided.settings = _SETTINGS
TestRemoteAccessible = KeyLifetimesRemoteAccessible.TestCase
TestRemoteAccessible.settings = _SETTINGS
