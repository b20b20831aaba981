"""pull_cache and pull_blocks between two nodes, byte for byte with guards, by every transport and in both modes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from support.datadist_cluster import Cluster, failure
from support.datadist_peer import Peer, RemoteCache

from vllm_datadist_connector.llm_datadist import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex, LLMStatusCode

TENSORS, ROWS, ROW_BYTES = 6, 6, 40
PREFIX_ONLY = 2**64 - 1


@dataclass
class Ends:
    """A decoder, the client, that is linked with a prompt."""

    cluster: Cluster
    prompt: Peer
    decoder: Peer
    remote_accessible: bool


@pytest.fixture(params=["remote-accessible", "two-sided"])
def ends(request: pytest.FixtureRequest, cluster: Cluster) -> Ends:
    """Not linked yet: what is registered before is reachable in any mode."""
    accessible = request.param == "remote-accessible"
    prompt = cluster.open(1, role="PROMPT", enable_remote_cache_accessible=accessible)
    decoder = cluster.open(2, role="DECODER", listen="", enable_remote_cache_accessible=accessible)
    return Ends(cluster, prompt, decoder, accessible)


def linked(ends: Ends, layout: str, src: dict[str, Any] | None = None, dst: dict[str, Any] | None = None):
    """A cache of each end, and the link."""
    shape = {"layout": layout, "tensors": TENSORS, "rows": ROWS, "row_bytes": ROW_BYTES}
    caches = ends.prompt.register("src", **(shape | (src or {}))), ends.decoder.register("dst", **(shape | (dst or {})))
    ends.decoder.link(ends.prompt)
    return caches


@pytest.mark.parametrize(("src_row", "dst_row"), [(0, 0), (2, 5), (5, 2)])
@pytest.mark.parametrize("size", [1, 33, ROW_BYTES, -1])
def test_part_of_a_row(ends: Ends, src_row: int, dst_row: int, size: int) -> None:
    src, dst = linked(ends, "contiguous")
    ends.decoder.manager.pull_cache(src.row(src_row), dst, dst_row, size)
    dst.expect_rows(src, [(src_row, dst_row)], size=None if size == -1 else size)
    ends.cluster.check()


def test_rows_larger_than_a_frame(ends: Ends) -> None:
    src, dst = linked(ends, "contiguous", *[{"tensors": 2, "rows": 3, "row_bytes": (1 << 20) + 40}] * 2)
    ends.decoder.manager.pull_cache(src.row(1), dst, 2)
    dst.expect_rows(src, [(1, 2)])
    ends.cluster.check()


LAYERS = [
    # source layers, destination layers, tensors per layer, (first source tensor, first destination tensor, count)
    (range(1, 3), range(2), 2, (2, 0, 4)),
    (range(2, 3), range(1), 2, (4, 0, 2)),
    (range(5, 6), range(3, 4), 1, (5, 3, 1)),
    (range(2), range(4, 6), 1, (0, 4, 2)),
    (range(1), range(1, 2), 3, (0, 3, 3)),
    (range(2), range(2), 3, (0, 0, 6)),
    (range(3), None, 2, (0, 0, 6)),
    (None, range(6), 1, (0, 0, 6)),
    (None, None, 3, (0, 0, 6)),
]


@pytest.mark.parametrize(("src_layers", "dst_layers", "tensors_per_layer", "moved"), LAYERS)
def test_layers(
    ends: Ends,
    src_layers: range | None,
    dst_layers: range | None,
    tensors_per_layer: int,
    moved: tuple[int, int, int],
) -> None:
    src, dst = linked(ends, "contiguous")
    src_blocks = ends.prompt.register("src blocks", layout="blocks", tensors=TENSORS, rows=ROWS, row_bytes=ROW_BYTES)
    dst_blocks = ends.decoder.register("dst blocks", layout="blocks", tensors=TENSORS, rows=ROWS, row_bytes=ROW_BYTES)
    layers = {"src_layer_range": src_layers, "dst_layer_range": dst_layers, "tensor_num_per_layer": tensors_per_layer}
    tensors = [(moved[0] + i, moved[1] + i) for i in range(moved[2])]
    ends.decoder.manager.pull_cache(src.row(1), dst, 3, **layers)
    dst.expect_rows(src, [(1, 3)], tensors)
    ends.decoder.manager.pull_blocks(src_blocks.blocks_key, dst_blocks, [4, 0], [0, 5], **layers)
    dst_blocks.expect_rows(src_blocks, [(4, 0), (0, 5)], tensors)
    ends.cluster.check()


def test_one_range_alone_selects_as_much_as_all_of_the_other_cache(ends: Ends) -> None:
    few, many = {"tensors": 2}, {"tensors": 6}
    src, dst = linked(ends, "contiguous", many, few)
    wide = ends.decoder.register("wide", tensors=6)
    narrow = ends.prompt.register("narrow", tensors=2)
    pull = ends.decoder.manager.pull_cache
    pull(src.row(0), dst, 0, src_layer_range=range(1, 2))
    dst.expect_rows(src, [(0, 0)], [(2, 0), (3, 1)])
    pull(narrow.row(0), wide, 0, dst_layer_range=range(2, 3))
    wide.expect_rows(narrow, [(0, 0)], [(0, 4), (1, 5)])
    for key, cache, layers in (
        (src.row(0), dst, {}),
        (src.row(0), dst, {"src_layer_range": range(2)}),
        (src.row(0), wide, {"src_layer_range": range(1)}),
        (src.row(0), wide, {"dst_layer_range": range(2)}),
        (narrow.row(0), wide, {"dst_layer_range": range(3)}),
    ):
        assert failure(pull, key, cache, 1, **layers) == LLMStatusCode.LLM_PARAM_INVALID, layers
    ends.cluster.check()


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_index": ROWS - 1, "size": 2**40},
        {"batch_index": ROWS},
        {"size": ROW_BYTES + 1},
        {"src_layer_range": range(3, 4), "dst_layer_range": range(1)},
        {"src_layer_range": range(1), "dst_layer_range": range(3, 4)},
        {"src_layer_range": range(2), "dst_layer_range": range(1)},
        {"src_layer_range": range(2, 3), "dst_layer_range": range(1), "tensor_num_per_layer": 4},
        {"src_layer_range": range(1), "dst_layer_range": range(1), "tensor_num_per_layer": 5},
    ],
)
def test_what_is_out_of_range_moves_nothing(ends: Ends, arguments: dict[str, Any]) -> None:
    src, dst = linked(ends, "contiguous")
    pull = ends.decoder.manager.pull_cache
    assert failure(pull, src.row(0), dst, **arguments) == LLMStatusCode.LLM_PARAM_INVALID
    assert failure(pull, src.row(ROWS), dst) == LLMStatusCode.LLM_PARAM_INVALID
    ends.cluster.check()


BLOCKS = [([0, 1, 3], [2, 3, 0]), ([1, 0], [1, 0]), ([0, 0], [1, 2]), ([1, 2, 3], [4, 4, 4]), ([0, 1, 2], [3, 4, 5])]


@pytest.mark.parametrize(("src_blocks", "dst_blocks"), BLOCKS)
def test_blocks_in_list_order(ends: Ends, src_blocks: list[int], dst_blocks: list[int]) -> None:
    src, dst = linked(ends, "blocks")
    ends.decoder.manager.pull_blocks(src.blocks_key, dst, src_blocks, dst_blocks)
    dst.expect_rows(src, list(zip(src_blocks, dst_blocks, strict=True)))
    ends.cluster.check()


@pytest.mark.parametrize(("src_blocks", "dst_blocks"), [([ROWS], [0]), ([0], [ROWS]), ([4, 5, 6], [0, 1, 2])])
def test_blocks_out_of_range_move_nothing(ends: Ends, src_blocks: list[int], dst_blocks: list[int]) -> None:
    src, dst = linked(ends, "blocks")
    pull = ends.decoder.manager.pull_blocks
    assert failure(pull, src.blocks_key, dst, src_blocks, dst_blocks) == LLMStatusCode.LLM_PARAM_INVALID
    ends.cluster.check()


@pytest.mark.parametrize("blocks", [[5, 0, 3, 1], [0, 1, 2], [4]])
@pytest.mark.parametrize("src_row", [0, 2])
def test_a_row_into_blocks(ends: Ends, blocks: list[int], src_row: int) -> None:
    """A row of 100 bytes and blocks of 30: the fourth piece is 10 bytes, and the row after it is never read."""
    src, dst = linked(ends, "contiguous", {"rows": 3, "row_bytes": 100}, {"layout": "blocks", "row_bytes": 30})
    ends.decoder.manager.pull_blocks(src.row(src_row), dst, [], blocks)
    dst.expect_pieces(src, src_row, blocks)
    ends.cluster.check()


def test_a_row_has_no_more_pieces_than_it_has_bytes(ends: Ends) -> None:
    src, dst = linked(ends, "contiguous", {"rows": 3, "row_bytes": 100}, {"layout": "blocks", "row_bytes": 30})
    pull = ends.decoder.manager.pull_blocks
    assert failure(pull, src.row(0), dst, [], [0, 1, 2, 3, 4]) == LLMStatusCode.LLM_PARAM_INVALID
    assert failure(pull, src.row(3), dst, [], [0]) == LLMStatusCode.LLM_PARAM_INVALID
    assert failure(pull, src.row(0), dst, [0], [0]) == LLMStatusCode.LLM_PARAM_INVALID
    ends.cluster.check()


def test_a_row_into_blocks_by_layers(ends: Ends) -> None:
    src, dst = linked(ends, "contiguous", {"rows": 3, "row_bytes": 100}, {"layout": "blocks", "row_bytes": 30})
    layers = {"src_layer_range": range(1, 2), "dst_layer_range": range(2, 3)}
    ends.decoder.manager.pull_blocks(src.row(1), dst, [], [3, 2, 1, 0], **layers)
    dst.expect_pieces(src, 1, [3, 2, 1, 0], [(2, 4), (3, 5)])
    ends.cluster.check()


def test_a_row_by_its_key_into_blocks(ends: Ends) -> None:
    keys = [CacheKey(1, 70), CacheKey(1, 71, 9), CacheKey(1, PREFIX_ONLY, 0, 72)]
    src, dst = linked(
        ends, "contiguous", {"rows": 3, "row_bytes": 100, "keys": keys}, {"layout": "blocks", "row_bytes": 30}
    )
    for row, key in enumerate(keys):
        ends.decoder.manager.pull_blocks(key, dst, [], [row, 5 - row])
        dst.expect_pieces(src, row, [row, 5 - row])
    unknown = CacheKey(1, 71)
    assert failure(ends.decoder.manager.pull_blocks, unknown, dst, [], [0]) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    ends.cluster.check()


def test_pull_cache_by_key_is_for_the_two_sided_mode(ends: Ends) -> None:
    src, dst = linked(ends, "contiguous", {"keys": [CacheKey(1, 70), CacheKey(1, 71)]})
    if ends.remote_accessible:
        with pytest.raises(TypeError, match="only support"):
            ends.decoder.manager.pull_cache(CacheKey(1, 71), dst)
    else:
        ends.decoder.manager.pull_cache(CacheKey(1, 71), dst, 4)
        dst.expect_rows(src, [(1, 4)])
    ends.cluster.check()


def test_either_end_pulls(ends: Ends) -> None:
    src, dst = linked(ends, "contiguous")
    ends.prompt.manager.pull_cache(dst.row(5), src, 0)
    src.expect_rows(dst, [(5, 0)])
    ends.decoder.manager.pull_cache(src.row(0), dst, 1)
    dst.expect_rows(src, [(0, 1)])
    ends.cluster.check()


def test_unknown_names(ends: Ends) -> None:
    src, dst = linked(ends, "contiguous")
    blocks = ends.decoder.register("blocks", layout="blocks")
    manager = ends.decoder.manager
    unknown_cache = CacheKeyByIdAndIndex(1, src.cache_id + 7)
    assert failure(manager.pull_cache, unknown_cache, dst) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    unknown_key = BlocksCacheKey(1, 123456)
    assert failure(manager.pull_blocks, unknown_key, blocks, [0], [0]) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    unlinked = CacheKeyByIdAndIndex(77, src.cache_id)
    assert failure(manager.pull_cache, unlinked, dst) == LLMStatusCode.LLM_NOT_YET_LINK
    ourselves = CacheKeyByIdAndIndex(2, dst.cache_id)
    assert failure(manager.pull_cache, ourselves, dst) == LLMStatusCode.LLM_PARAM_INVALID
    ends.cluster.check()


def test_unregistered_while_linked(ends: Ends) -> None:
    src, dst = linked(ends, "contiguous")
    other = ends.prompt.register("other", tensors=TENSORS)
    pull = ends.decoder.manager.pull_cache
    pull(src.row(0), dst, 0)
    dst.expect_rows(src, [(0, 0)])
    ends.prompt.manager.unregister_cache(src.cache_id)
    assert failure(pull, src.row(1), dst, 1) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    pull(other.row(2), dst, 1)  # the row that the failed pull has left undefined
    dst.expect_rows(other, [(2, 1)])
    ends.decoder.manager.unregister_cache(dst.cache_id)
    assert failure(pull, other.row(3), dst, 2) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    ends.cluster.check()


def test_blocks_of_another_length_are_refused(ends: Ends) -> None:
    """As rows are in remote-accessible mode; test_two_sided_processes.py has those of the other mode."""
    src, _ = linked(ends, "blocks")
    rows = ends.prompt.register("rows", tensors=TENSORS)
    for row_bytes in (30, 50):
        blocks = ends.decoder.register(f"blocks of {row_bytes}", layout="blocks", tensors=TENSORS, row_bytes=row_bytes)
        pull = ends.decoder.manager.pull_blocks
        assert failure(pull, src.blocks_key, blocks, [1], [2]) == LLMStatusCode.LLM_PARAM_INVALID
        dst = ends.decoder.register(f"rows of {row_bytes}", tensors=TENSORS, row_bytes=row_bytes)
        if ends.remote_accessible:
            assert failure(ends.decoder.manager.pull_cache, rows.row(1), dst, 2, 10) == LLMStatusCode.LLM_PARAM_INVALID
    ends.cluster.check()


def test_blocks_are_not_pulled_as_a_row(ends: Ends) -> None:
    src, dst = linked(ends, "contiguous", {"layout": "blocks"})
    for batch_index in (0, 1):
        assert failure(ends.decoder.manager.pull_cache, src.row(batch_index), dst) == LLMStatusCode.LLM_PARAM_INVALID
    ends.cluster.check()


def host_caches(ends: Ends) -> tuple[RemoteCache, RemoteCache]:
    ends.prompt.register("open", placement="HOST", remote_accessible=True)
    return linked(ends, "contiguous", {"placement": "HOST"})


def test_host_caches_are_not_remotely_accessible_unless_asked_for(ends: Ends) -> None:
    src, dst = host_caches(ends)
    pull = ends.decoder.manager.pull_cache
    opened = ends.prompt.caches["open"]
    if ends.remote_accessible:
        assert failure(pull, src.row(0), dst, 0) == LLMStatusCode.LLM_PARAM_INVALID
        with_all_tensors = ends.decoder.register("dst of open")
        pull(opened.row(3), with_all_tensors, 0)
        with_all_tensors.expect_rows(opened, [(3, 0)])
    else:
        pull(src.row(0), dst, 0)
        dst.expect_rows(src, [(0, 0)])
    ends.cluster.check()
