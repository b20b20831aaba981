"""CacheManager moves the right bytes and no other: transfers with a loopback peer, by every transport and mode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from support.arenas import OURS, PEER, Arena, link_with_itself, managed, move_rows

from vllm_datadist_connector import _native
from vllm_datadist_connector.llm_datadist.status import LLMException, LLMStatusCode
from vllm_datadist_connector.llm_datadist.v2.cache_manager import CacheManager
from vllm_datadist_connector.llm_datadist.v2.llm_types import (
    BlocksCacheKey,
    Cache,
    CacheKey,
    CacheKeyByIdAndIndex,
    Placement,
)

TENSORS, ROWS, ROW_BYTES = 8, 6, 40
NONE = 2**64 - 1
EVERY = [(tensor, tensor) for tensor in range(TENSORS)]


@dataclass
class Pair:
    """A linked manager with a source and a destination of each layout."""

    engine: _native.ManagedDataDist
    caches: CacheManager
    src: Arena
    dst: Arena
    src_rows: Cache
    dst_rows: Cache
    src_blocks: Cache
    dst_blocks: Cache
    """The same layout and memory as *_rows, in arenas of their own: see src_block_arena and dst_block_arena."""
    src_block_arena: Arena
    dst_block_arena: Arena

    def row_key(self, batch_index: int) -> CacheKeyByIdAndIndex:
        return CacheKeyByIdAndIndex(PEER, self.src_rows.cache_id, batch_index)


def make_pair(engine: _native.ManagedDataDist, remote_accessible: bool) -> Pair:
    caches = CacheManager(engine, OURS, remote_accessible=remote_accessible, pools=frozenset())
    arenas = [Arena(seed, TENSORS, ROWS, ROW_BYTES) for seed in range(4)]
    keys = [CacheKey(OURS, 100), CacheKey(OURS, NONE), CacheKey(OURS, NONE, 0, 102), CacheKey(OURS, 103, 7)]
    src_rows = caches.register_cache(arenas[0].desc(), arenas[0].addrs, keys)
    dst_rows = caches.register_cache(arenas[1].desc(), arenas[1].addrs)
    src_blocks = caches.register_blocks_cache(arenas[2].desc(), arenas[2].addrs, BlocksCacheKey(OURS, 5))
    dst_blocks = caches.register_blocks_cache(arenas[3].desc(), arenas[3].addrs, BlocksCacheKey(OURS, 6))
    link_with_itself(engine)
    return Pair(engine, caches, arenas[0], arenas[1], src_rows, dst_rows, src_blocks, dst_blocks, arenas[2], arenas[3])


@pytest.fixture(params=["two-sided", "remote-accessible"])
def pair(request: pytest.FixtureRequest, transport: str) -> Iterator[Pair]:
    accessible = request.param == "remote-accessible"
    options = {"datadist.Transport": transport, "llm.EnableRemoteCacheAccessible": "1" if accessible else "0"}
    with managed(options) as engine:
        yield make_pair(engine, accessible)


@pytest.fixture
def remote(transport: str) -> Iterator[Pair]:
    with managed({"datadist.Transport": transport, "llm.EnableRemoteCacheAccessible": "1"}) as engine:
        yield make_pair(engine, remote_accessible=True)


@pytest.fixture
def two_sided(transport: str) -> Iterator[Pair]:
    with managed({"datadist.Transport": transport}) as engine:
        yield make_pair(engine, remote_accessible=False)


def expect(pair: Pair, rows: Arena, blocks: Arena) -> None:
    """Both destinations, and sources that nobody touched."""
    assert pair.dst == rows
    assert pair.dst_block_arena == blocks
    assert pair.src == Arena(0, TENSORS, ROWS, ROW_BYTES)
    assert pair.src_block_arena == Arena(2, TENSORS, ROWS, ROW_BYTES)


def failure(call: object) -> LLMStatusCode:
    with pytest.raises(LLMException) as caught:
        call()  # type: ignore[operator]
    return caught.value.status_code


# ---- pull ----


def test_pull_a_row(pair: Pair) -> None:
    rows = pair.dst.copy()
    pair.caches.pull_cache(pair.row_key(2), pair.dst_rows, 5)
    move_rows(pair.src, rows, EVERY, [(2, 5)])
    expect(pair, rows, pair.dst_block_arena.copy())
    assert pair.dst[0][5].tolist() == pair.src[0][2].tolist()


@pytest.mark.parametrize("size", [1, 33, ROW_BYTES])
def test_pull_part_of_a_row(pair: Pair, size: int) -> None:
    rows = pair.dst.copy()
    pair.caches.pull_cache(pair.row_key(5), pair.dst_rows, 0, size)
    for tensor in range(TENSORS):
        rows[tensor][0, :size] = pair.src[tensor][5, :size]
    expect(pair, rows, pair.dst_block_arena.copy())


@pytest.mark.parametrize(
    ("src_layers", "dst_layers", "tensors_per_layer", "pairs"),
    [
        (range(1, 3), range(2), 2, [(2, 0), (3, 1), (4, 2), (5, 3)]),
        (range(7, 8), range(1), 1, [(7, 0)]),
        (range(1), range(1, 2), 4, [(0, 4), (1, 5), (2, 6), (3, 7)]),
        (range(4), None, 2, EVERY),
        (None, range(8), 1, EVERY),
    ],
)
def test_pull_layers(
    pair: Pair,
    src_layers: range | None,
    dst_layers: range | None,
    tensors_per_layer: int,
    pairs: list[tuple[int, int]],
) -> None:
    rows, blocks = pair.dst.copy(), pair.dst_block_arena.copy()
    layers = {"src_layer_range": src_layers, "dst_layer_range": dst_layers, "tensor_num_per_layer": tensors_per_layer}
    pair.caches.pull_cache(pair.row_key(1), pair.dst_rows, 3, **layers)
    move_rows(pair.src, rows, pairs, [(1, 3)])
    pair.caches.pull_blocks(BlocksCacheKey(PEER, 5), pair.dst_blocks, [4, 0], [0, 5], **layers)
    move_rows(pair.src_block_arena, blocks, pairs, [(4, 0), (0, 5)])
    expect(pair, rows, blocks)


@pytest.mark.parametrize(
    ("src_blocks", "dst_blocks"),
    [([0, 1, 3], [2, 3, 0]), ([1, 0], [1, 0]), ([0, 0], [1, 2]), ([1, 2, 3], [4, 4, 4]), (range(6), range(6))],
)
def test_pull_blocks_in_list_order(pair: Pair, src_blocks: list[int], dst_blocks: list[int]) -> None:
    blocks = pair.dst_block_arena.copy()
    pair.caches.pull_blocks(BlocksCacheKey(PEER, 5), pair.dst_blocks, list(src_blocks), tuple(dst_blocks))
    move_rows(pair.src_block_arena, blocks, EVERY, list(zip(src_blocks, dst_blocks, strict=True)))
    expect(pair, pair.dst.copy(), blocks)


def test_pull_a_row_by_its_key(two_sided: Pair) -> None:
    rows = two_sided.dst.copy()
    keys = [(CacheKey(PEER, 100), 0), (CacheKey(PEER, NONE, 0, 102), 2), (CacheKey(PEER, 103, 7), 3)]
    for dst_row, (key, src_row) in enumerate(keys):
        two_sided.caches.pull_cache(key, two_sided.dst_rows, dst_row)
        two_sided.caches.pull_cache(key, two_sided.dst_rows, dst_row + 3)  # keys of a registered cache stay
        move_rows(two_sided.src, rows, EVERY, [(src_row, dst_row), (src_row, dst_row + 3)])
    expect(two_sided, rows, two_sided.dst_block_arena.copy())
    for unknown in (CacheKey(PEER, 101), CacheKey(PEER, 103), CacheKey(PEER, 102), CacheKey(PEER, NONE, 0, 100)):
        do = lambda key=unknown: two_sided.caches.pull_cache(key, two_sided.dst_rows)  # noqa: E731
        assert failure(do) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    expect(two_sided, rows, two_sided.dst_block_arena.copy())


def pulled_into_blocks(pair: Pair, arena: Arena, src_row: int, dst_blocks: list[int]) -> None:
    """The oracle of row to blocks."""
    block_bytes = arena[0].shape[1]
    for tensor in range(len(arena)):
        for piece, dst_block in enumerate(dst_blocks):
            data = pair.src[tensor][src_row, piece * block_bytes : (piece + 1) * block_bytes]
            arena[tensor][dst_block, : len(data)] = data


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize(
    ("block_bytes", "dst_blocks"), [(16, [4, 0, 2]), (16, [3, 1]), (20, [5, 4]), (40, [2]), (64, [1])]
)
def test_pull_a_row_into_blocks(pair: Pair, by_key: bool, block_bytes: int, dst_blocks: list[int]) -> None:
    arena = Arena(9, TENSORS, ROWS, block_bytes)
    cache = pair.caches.register_blocks_cache(arena.desc(), arena.addrs)
    expected = arena.copy()
    key = CacheKey(PEER, 103, 7) if by_key else pair.row_key(3)
    pair.caches.pull_blocks(key, cache, dst_blocks=dst_blocks)
    pulled_into_blocks(pair, expected, 3, dst_blocks)
    assert arena == expected
    expect(pair, pair.dst.copy(), pair.dst_block_arena.copy())


def test_a_row_has_no_more_pieces_than_its_bytes(pair: Pair) -> None:
    arena = Arena(9, TENSORS, ROWS, 16)
    cache = pair.caches.register_blocks_cache(arena.desc(), arena.addrs)
    before = arena.copy()
    do = lambda: pair.caches.pull_blocks(pair.row_key(3), cache, dst_blocks=[0, 1, 2, 3])  # noqa: E731
    assert failure(do) == LLMStatusCode.LLM_PARAM_INVALID
    assert arena == before


def test_pull_out_of_range_moves_nothing(pair: Pair) -> None:
    caches, rows, blocks = pair.caches, pair.dst_rows, pair.dst_blocks
    invalid = [
        lambda: caches.pull_cache(pair.row_key(6), rows),
        lambda: caches.pull_cache(pair.row_key(0), rows, 6),
        lambda: caches.pull_cache(pair.row_key(0), rows, size=ROW_BYTES + 1),
        lambda: caches.pull_cache(pair.row_key(0), rows, src_layer_range=range(4, 5), dst_layer_range=range(1)),
        lambda: caches.pull_cache(pair.row_key(0), rows, src_layer_range=range(1), dst_layer_range=range(4, 5)),
        lambda: caches.pull_cache(pair.row_key(0), rows, src_layer_range=range(1), dst_layer_range=range(2)),
        lambda: caches.pull_cache(pair.row_key(0), rows, src_layer_range=range(1)),
        lambda: caches.pull_cache(pair.row_key(0), rows, dst_layer_range=range(2)),
        lambda: caches.pull_cache(pair.row_key(0), rows, src_layer_range=range(1), tensor_num_per_layer=3),
        lambda: caches.pull_cache(pair.row_key(0), rows, src_layer_range=range(1), tensor_num_per_layer=2**32 - 1),
        lambda: caches.pull_cache(
            pair.row_key(0), rows, src_layer_range=range(2**31 - 2, 2**31 - 1), dst_layer_range=range(1)
        ),
        lambda: caches.pull_blocks(BlocksCacheKey(PEER, 5), blocks, [6], [0]),
        lambda: caches.pull_blocks(BlocksCacheKey(PEER, 5), blocks, [0], [6]),
        lambda: caches.pull_blocks(BlocksCacheKey(PEER, 5), blocks, [0], [-1]),
        lambda: caches.pull_blocks(BlocksCacheKey(PEER, 5), blocks, [2**70], [0]),
        lambda: caches.pull_cache(CacheKeyByIdAndIndex(PEER, pair.src_blocks.cache_id), rows),
    ]
    for index, do in enumerate(invalid):
        assert failure(do) == LLMStatusCode.LLM_PARAM_INVALID, index
    missing = [
        lambda: caches.pull_cache(CacheKeyByIdAndIndex(PEER, 99), rows),
        lambda: caches.pull_blocks(BlocksCacheKey(PEER, 4), blocks, [0], [0]),
        lambda: caches.pull_blocks(CacheKey(PEER, 999), blocks, [], [0]),
    ]
    for index, do in enumerate(missing):
        assert failure(do) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST, index
    unlinked = CacheKeyByIdAndIndex(3, pair.src_rows.cache_id)
    assert failure(lambda: caches.pull_cache(unlinked, rows)) == LLMStatusCode.LLM_NOT_YET_LINK
    expect(pair, Arena(1, TENSORS, ROWS, ROW_BYTES), Arena(3, TENSORS, ROWS, ROW_BYTES))


def test_an_unregistered_cache_is_gone(pair: Pair) -> None:
    pair.caches.unregister_cache(pair.src_rows.cache_id)
    pair.caches.unregister_cache(pair.src_rows.cache_id)
    pull = lambda: pair.caches.pull_cache(pair.row_key(0), pair.dst_rows)  # noqa: E731
    assert failure(pull) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    pair.caches.unregister_cache(pair.dst_blocks.cache_id)
    into = lambda: pair.caches.pull_blocks(BlocksCacheKey(PEER, 5), pair.dst_blocks, [0], [0])  # noqa: E731
    assert failure(into) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST


def test_host_memory_is_not_remotely_accessible_unless_asked_for(transport: str) -> None:
    with managed({"datadist.Transport": transport, "llm.EnableRemoteCacheAccessible": "1"}) as engine:
        caches = CacheManager(engine, OURS, remote_accessible=True, pools=frozenset())
        hidden, shown, local = Arena(1), Arena(2), Arena(3)
        hidden_id = caches.register_cache(hidden.desc(Placement.HOST), hidden.addrs).cache_id
        shown_id = caches.register_cache(shown.desc(Placement.HOST), shown.addrs, remote_accessible=True).cache_id
        into = caches.register_cache(local.desc(), local.addrs)
        link_with_itself(engine)
        pull = lambda: caches.pull_cache(CacheKeyByIdAndIndex(PEER, hidden_id), into)  # noqa: E731
        assert failure(pull) == LLMStatusCode.LLM_PARAM_INVALID
        assert local == Arena(3)
        expected = local.copy()
        caches.pull_cache(CacheKeyByIdAndIndex(PEER, shown_id), into)
        move_rows(shown, expected, EVERY, [(0, 0)])
        assert local == expected


# ---- push ----


@pytest.mark.parametrize(
    ("src_layers", "dst_layers", "tensors_per_layer", "pairs"),
    [
        (None, None, 2, EVERY),
        (range(1, 3), range(2), 2, [(2, 0), (3, 1), (4, 2), (5, 3)]),
        (range(7, 8), range(1), 1, [(7, 0)]),
        (None, None, 8, EVERY),
    ],
)
def test_push(
    remote: Pair,
    src_layers: range | None,
    dst_layers: range | None,
    tensors_per_layer: int,
    pairs: list[tuple[int, int]],
) -> None:
    rows, blocks = remote.dst.copy(), remote.dst_block_arena.copy()
    key = CacheKeyByIdAndIndex(PEER, remote.dst_rows.cache_id, 4)
    remote.caches.push_cache(key, remote.src_rows, 2, src_layers, dst_layers, tensor_num_per_layer=tensors_per_layer)
    move_rows(remote.src, rows, pairs, [(2, 4)])
    remote.caches.push_blocks(
        BlocksCacheKey(PEER, 6), remote.src_blocks, [1, 2, 5], (3, 4, 3), src_layers, dst_layers, tensors_per_layer
    )
    move_rows(remote.src_block_arena, blocks, pairs, [(1, 3), (2, 4), (5, 3)])
    expect(remote, rows, blocks)


def test_push_out_of_range_moves_nothing(remote: Pair) -> None:
    caches = remote.caches
    key = CacheKeyByIdAndIndex(PEER, remote.dst_rows.cache_id)
    too_far = CacheKeyByIdAndIndex(PEER, remote.dst_rows.cache_id, 6)
    blocks_key = BlocksCacheKey(PEER, 6)
    invalid = [
        lambda: caches.push_cache(too_far, remote.src_rows),
        lambda: caches.push_cache(key, remote.src_rows, 6),
        lambda: caches.push_cache(key, remote.src_rows, 0, range(4, 5), range(1)),
        lambda: caches.push_cache(key, remote.src_rows, 0, range(1), range(4, 5)),
        lambda: caches.push_cache(key, remote.src_rows, 0, range(1), range(1), tensor_num_per_layer=3),
        lambda: caches.push_blocks(blocks_key, remote.src_blocks, [6], [0]),
        lambda: caches.push_blocks(blocks_key, remote.src_blocks, [0], [6]),
        lambda: caches.push_blocks(blocks_key, remote.src_blocks, [0, 1], [0]),
        lambda: caches.push_blocks(blocks_key, remote.src_blocks, (), [0]),
    ]
    for index, do in enumerate(invalid):
        assert failure(do) == LLMStatusCode.LLM_PARAM_INVALID, index
    absent = CacheKeyByIdAndIndex(PEER, 99)
    assert failure(lambda: caches.push_cache(absent, remote.src_rows)) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    expect(remote, Arena(1, TENSORS, ROWS, ROW_BYTES), Arena(3, TENSORS, ROWS, ROW_BYTES))


def test_layers_before_the_one_that_fails_stay_written(remote: Pair) -> None:
    rows = remote.dst.copy()
    key = CacheKeyByIdAndIndex(PEER, remote.dst_rows.cache_id)
    with pytest.raises(LLMException, match="layer 1 to layer 4"):
        remote.caches.push_cache(key, remote.src_rows, 0, range(2), range(3, 5))
    move_rows(remote.src, rows, [(0, 6), (1, 7)], [(0, 0)])
    expect(remote, rows, remote.dst_block_arena.copy())


def test_remap_asks_for_a_link(transport: str) -> None:
    with managed({"datadist.Transport": transport}) as engine:
        from vllm_datadist_connector.llm_datadist.v2.llm_types import MemInfo, Memtype

        caches = CacheManager(engine, OURS, remote_accessible=False, pools=frozenset())
        region = MemInfo(Memtype.MEM_TYPE_DEVICE, 4096, 64)
        assert failure(lambda: caches.remap_registered_memory(region)) == LLMStatusCode.LLM_NOT_YET_LINK
        link_with_itself(engine)
        caches.remap_registered_memory([region])
