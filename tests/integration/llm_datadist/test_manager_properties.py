"""Every transfer of CacheManager moves the bytes that a slow oracle says, and no other; what it refuses moves none.

As test_transfer_properties.py, through the Python API and within one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import transfer_oracle as oracle
from support import transfer_strategies as drawn
from support.shared_ends import OURS, PEER, End, Ends, loopback_ends
from support.transfer_oracle import CacheModel, Layout, Move, Pushed, RefusedError, Span

from vllm_datadist_connector.llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LayerSynchronizer,
    LLMException,
    LLMStatusCode,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from vllm_datadist_connector.llm_datadist.v2.cache_manager import CacheManager

SEEDS = st.integers(0, 2**32 - 1)
MODEL = 5
NOTHING = 2**64 - 1
EXAMPLES = settings(
    max_examples=200,
    deadline=None,
    # Building a call is most of an example's time, and shared machines are slow at times: neither is what is tested.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


class World:
    """A manager, and the memories of its caches and of the peer's, which are of the same manager."""

    def __init__(self, ends: Ends) -> None:
        self.ends = ends
        self.manager = CacheManager(ends.engine, OURS, remote_accessible=ends.remote_accessible, pools=frozenset())

    @contextmanager
    def caches(self, ours: CacheModel, theirs: CacheModel, key_row: int = 0) -> Iterator[tuple[Cache, Cache]]:
        """Theirs has a key: MODEL if it is of blocks, else request 77 for the row `key_row`."""
        made = self._register(self.ends.ours, ours, None), self._register(self.ends.theirs, theirs, key_row)
        try:
            yield made
        finally:
            for cache in made:
                self.manager.unregister_cache(cache.cache_id)

    def _register(self, end: End, model: CacheModel, key_row: int | None) -> Cache:
        desc = CacheDesc(model.tensors, model.shape, DataType(model.data_type))
        addrs = [end.base + start for start in model.starts]
        if model.layout == "blocks":
            key = None if key_row is None else BlocksCacheKey(OURS, MODEL)
            return self.manager.register_blocks_cache(desc, addrs, key)
        named = key_row is not None and key_row < model.rows
        keys = [CacheKey(OURS, NOTHING)] * key_row + [CacheKey(OURS, 77)] if named else []
        return self.manager.register_cache(desc, addrs, keys)

    def compare(
        self, seed: int, call: Callable[[], object], steps: Callable[[], Iterable[list[Move]]], pull: bool
    ) -> None:
        """Makes the call: its end and every byte of both memories are what the oracle says, step by step."""
        ours, theirs = self.ends.fill(seed)
        expected, why = LLMStatusCode.LLM_SUCCESS, "it is allowed"
        try:
            for moves in steps():
                oracle.apply(moves, *((theirs, ours) if pull else (ours, theirs)))
        except RefusedError as refused:
            expected, why = LLMStatusCode.LLM_PARAM_INVALID, str(refused)
        status, text = outcome(call)
        assert status == expected, f"{text!r}: {why}"
        assert self.ends.ours.memory.tobytes() == ours
        assert self.ends.theirs.memory.tobytes() == theirs


def outcome(call: Callable[[], object]) -> tuple[LLMStatusCode, str]:
    try:
        result = call()
    except LLMException as error:
        return error.status_code, str(error)
    return (result if isinstance(result, LLMStatusCode) else LLMStatusCode.LLM_SUCCESS), ""


@pytest.fixture(scope="module", params=[False, True], ids=["two-sided", "remote-accessible"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with loopback_ends("local", request.param) as ends:
        yield World(ends)


@pytest.fixture(scope="module")
def remote_accessible() -> Iterator[World]:
    with loopback_ends("local", True) as ends:
        yield World(ends)


@pytest.fixture(scope="module")
def two_sided() -> Iterator[World]:
    with loopback_ends("local", False) as ends:
        yield World(ends)


def as_range(span: Span | None) -> range | None:
    return None if span is None else range(*span)


def layers_of(layers: oracle.Layers) -> dict[str, object]:
    return {
        "src_layer_range": as_range(layers.src),
        "dst_layer_range": as_range(layers.dst),
        "tensor_num_per_layer": layers.per_layer,
    }


def test_pull_cache(world: World) -> None:
    @EXAMPLES
    @given(drawn.pulls_of_rows(drawn.WHOLE_BYTES, with_offsets=False), SEEDS)
    def check(pull: drawn.PullRows, seed: int) -> None:
        src, dst = pull.caches.src, pull.caches.dst
        with world.caches(dst, src, pull.rows[0]) as (cache, remote):
            by_id = CacheKeyByIdAndIndex(PEER, remote.cache_id, pull.rows[0])
            key = CacheKey(PEER, 77) if pull.by_key and not world.ends.remote_accessible else by_id
            arguments = (src, dst, pull.layers, pull.rows, pull.size, (0, 0), not world.ends.remote_accessible)
            world.compare(
                seed,
                lambda: world.manager.pull_cache(key, cache, pull.rows[1], pull.size, **layers_of(pull.layers)),
                lambda: [oracle.pull_rows(*arguments)],
                pull=True,
            )

    check()


@pytest.mark.parametrize("pulls", [drawn.pulls_of_blocks, drawn.pulls_into_blocks])
def test_pull_blocks(world: World, pulls: Callable[..., st.SearchStrategy[drawn.PullBlocks]]) -> None:
    @EXAMPLES
    @given(pulls(drawn.WHOLE_BYTES), SEEDS)
    def check(pull: drawn.PullBlocks, seed: int) -> None:
        src, dst = pull.caches.src, pull.caches.dst
        with world.caches(dst, src, pull.src_row) as (cache, remote):
            key: BlocksCacheKey | CacheKey | CacheKeyByIdAndIndex
            if pull.src_blocks and src.layout == "blocks":
                key = BlocksCacheKey(PEER, MODEL)
            elif pull.by_key:
                key = CacheKey(PEER, 77)
            else:
                key = CacheKeyByIdAndIndex(PEER, remote.cache_id, pull.src_row)
            arguments = (src, dst, pull.layers, pull.src_blocks, pull.dst_blocks, pull.src_row)

            def steps() -> list[list[Move]]:
                oracle.require(isinstance(key, BlocksCacheKey) or not pull.src_blocks, "blocks of a row")
                return [oracle.pull_blocks(*arguments)]

            blocks = (pull.src_blocks, pull.dst_blocks)
            do = lambda: world.manager.pull_blocks(key, cache, *blocks, **layers_of(pull.layers))  # noqa: E731
            world.compare(seed, do, steps, pull=True)

    check()


def test_push_cache(remote_accessible: World) -> None:
    world = remote_accessible

    @EXAMPLES
    @given(drawn.pushes_of_ranges(("rows", "rows"), drawn.WHOLE_BYTES), SEEDS)
    def check(push: drawn.PushLayers, seed: int) -> None:
        src, dst, pushed = push.caches.src, push.caches.dst, push.pushed
        with world.caches(src, dst) as (cache, remote):
            key = CacheKeyByIdAndIndex(PEER, remote.cache_id, pushed.dst_row)
            world.compare(
                seed,
                lambda: world.manager.push_cache(key, cache, pushed.src_row, **layers_of(push.layers)),
                lambda: oracle.push_layers(src, dst, push.layers, pushed),
                pull=False,
            )

    check()


def test_push_blocks(remote_accessible: World) -> None:
    world = remote_accessible

    @EXAMPLES
    @given(drawn.pushes_of_ranges(("blocks", "blocks"), drawn.WHOLE_BYTES), SEEDS)
    def check(push: drawn.PushLayers, seed: int) -> None:
        src, dst, pushed = push.caches.src, push.caches.dst, push.pushed
        with world.caches(src, dst) as (cache, _):
            key = BlocksCacheKey(PEER, MODEL) if dst.layout == "blocks" else None
            if key is None:  # a contiguous cache has no such name
                return
            blocks = (pushed.src_blocks, pushed.dst_blocks)
            world.compare(
                seed,
                lambda: world.manager.push_blocks(key, cache, *blocks, **layers_of(push.layers)),
                lambda: oracle.push_layers(src, dst, push.layers, pushed),
                pull=False,
            )

    check()


class AtOnce(LayerSynchronizer):
    def __init__(self) -> None:
        self.asked: list[int] = []

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:  # noqa: ARG002
        self.asked.append(layer_index)
        return True


def transfer(
    world: World, cache: Cache, configs: Sequence[TransferConfig] | Sequence[TransferWithCacheKeyConfig], pushed: Pushed
) -> LLMStatusCode:
    lists = (pushed.src_blocks or None, pushed.dst_blocks or None)
    task = world.manager.transfer_cache_async(cache, AtOnce(), configs, *lists, pushed.piece_bytes or None)
    status = task.synchronize()
    assert task.get_results() == [status]
    return status


def within_source(push: drawn.PushLayers) -> None:
    """What transfer_cache_async checks before its first layer."""
    src, layers = push.caches.src, push.layers
    assert layers.src is not None
    assert layers.dst is not None
    oracle.require(layers.src[1] <= src.tensors // 2, "layers beyond the source")
    oracle.require(layers.src[1] - layers.src[0] == layers.dst[1] - layers.dst[0], "ranges of different lengths")
    lengths = len(push.pushed.src_blocks), len(push.pushed.dst_blocks)
    oracle.require(not lengths[0] or lengths[0] == lengths[1], "lists of different lengths")


@pytest.mark.parametrize("layouts", drawn.PUSHED, ids="-to-".join)
def test_transfer_to_a_cache(remote_accessible: World, layouts: tuple[Layout, Layout]) -> None:
    world = remote_accessible

    @EXAMPLES
    @given(drawn.pushes_of_ranges(layouts, drawn.WHOLE_BYTES, per_layer=2), SEEDS)
    def check(push: drawn.PushLayers, seed: int) -> None:
        src, dst, pushed = push.caches.src, push.caches.dst, push.pushed
        with world.caches(src, dst) as (cache, remote):
            by_id = CacheKeyByIdAndIndex(PEER, remote.cache_id, pushed.dst_row)
            named = BlocksCacheKey(PEER, MODEL) if dst.layout == "blocks" and pushed.src_blocks else by_id

            def call() -> LLMStatusCode:
                ranges = (range(*push.layers.src), range(*push.layers.dst))  # type: ignore[misc]
                return transfer(world, cache, [TransferWithCacheKeyConfig(named, *ranges, pushed.src_row)], pushed)

            def steps() -> Iterator[list[Move]]:
                within_source(push)
                yield from oracle.push_layers(src, dst, push.layers, pushed)

            world.compare(seed, call, steps, pull=False)

    check()


@pytest.mark.parametrize("layouts", drawn.PUSHED, ids="-to-".join)
def test_transfer_to_addresses(two_sided: World, layouts: tuple[Layout, Layout]) -> None:
    """Those of the tensors that dst_layer_range names."""
    world = two_sided

    @EXAMPLES
    @given(drawn.pushes_of_ranges(layouts, drawn.WHOLE_BYTES, per_layer=2), SEEDS)
    def check(push: drawn.PushLayers, seed: int) -> None:
        src, dst, pushed = push.caches.src, push.caches.dst, push.pushed
        assert push.layers.src is not None
        assert push.layers.dst is not None
        tensors = range(push.layers.dst[0] * 2, push.layers.dst[1] * 2)
        starts = [dst.starts[tensor % dst.tensors] + (tensor >= dst.tensors) * (1 << 40) for tensor in tensors]
        layers = range(*push.layers.src)
        with world.caches(src, dst) as (cache, _):

            def call() -> LLMStatusCode:
                addrs = [world.ends.theirs.base + start for start in starts]
                return transfer(world, cache, [TransferConfig(PEER, addrs, layers, pushed.src_row)], pushed)

            def steps() -> Iterator[list[Move]]:
                within_source(push)
                for index, layer in enumerate(layers):
                    at = starts[2 * index : 2 * index + 2]
                    yield oracle.push_layer_to_addrs(src, [dst], layer, at, pushed)

            world.compare(seed, call, steps, pull=False)

    check()
