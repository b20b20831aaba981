"""transfer_cache_async to other nodes, layer by layer, byte for byte with guards, by every transport."""

from __future__ import annotations

from typing import Any

import pytest
from support.datadist_cluster import Cluster, failure
from support.datadist_peer import Gate, RemoteCache

from vllm_datadist_connector.llm_datadist import (
    LLMStatusCode,
    TransferConfig,
    TransferWithCacheKeyConfig,
)

SHAPE = {"tensors": 8, "rows": 5, "row_bytes": 48}
BLOCKS = {**SHAPE, "layout": "blocks"}
LAYERS = 4
DONE = LLMStatusCode.LLM_SUCCESS
WAIT_MS = 30_000


class Ends:
    """A prompt that is linked with one or more decoders."""

    def __init__(self, cluster: Cluster, remote_accessible: bool = True, decoders: int = 1) -> None:
        accessible = {"enable_remote_cache_accessible": remote_accessible}
        self.cluster = cluster
        self.prompt = cluster.open(1, role="PROMPT", listen="", **accessible)
        self.decoders = [cluster.open(2 + index, role="DECODER", **accessible) for index in range(decoders)]
        self.prompt.link(*self.decoders)

    def transfer(self, src: RemoteCache, gate: Gate, configs: list[Any], *blocks: Any) -> Any:
        """The running task."""
        return self.prompt.object(self.prompt.manager.transfer_cache_async(src, gate, configs, *blocks))

    def completes(self, src: RemoteCache, configs: list[Any], *blocks: Any) -> None:
        task = self.transfer(src, Gate(self.prompt, LAYERS), configs, *blocks)
        assert task.synchronize(WAIT_MS) == DONE
        assert task.get_results(WAIT_MS) == [DONE] * len(configs)


@pytest.fixture
def ends(cluster: Cluster) -> Ends:
    return Ends(cluster)


def tensors_of(src: range, dst: range) -> list[tuple[int, int]]:
    return [(2 * s + k, 2 * d + k) for s, d in zip(src, dst, strict=True) for k in range(2)]


RANGES = [(range(4), range(4)), (range(1, 3), range(2)), (range(2, 4), range(1, 3)), (range(1), range(3, 4))]


@pytest.mark.parametrize(("src_layers", "dst_layers"), RANGES)
def test_row_to_row(ends: Ends, src_layers: range, dst_layers: range) -> None:
    src, dst = ends.prompt.register("src", **SHAPE), ends.decoders[0].register("dst", **SHAPE)
    ends.completes(src, [TransferWithCacheKeyConfig(dst.row(4), src_layers, dst_layers, 2)])
    dst.expect_rows(src, [(2, 4)], tensors_of(src_layers, dst_layers))
    ends.cluster.check()


@pytest.mark.parametrize(("src_layers", "dst_layers"), RANGES)
def test_blocks_to_blocks(ends: Ends, src_layers: range, dst_layers: range) -> None:
    src, dst = ends.prompt.register("src", **BLOCKS), ends.decoders[0].register("dst", **BLOCKS)
    config = TransferWithCacheKeyConfig(dst.blocks_key, src_layers, dst_layers)
    ends.completes(src, [config], [0, 1, 4], [2, 3, 0])
    dst.expect_rows(src, [(0, 2), (1, 3), (4, 0)], tensors_of(src_layers, dst_layers))
    ends.cluster.check()


@pytest.mark.parametrize("blocks", [[3, 0, 2], [1], [0, 1]])
@pytest.mark.parametrize(("src_layers", "dst_layers"), RANGES[:2])
def test_row_to_blocks(ends: Ends, src_layers: range, dst_layers: range, blocks: list[int]) -> None:
    """48 bytes of a row are two blocks of 20 and 8 bytes of a third; nothing comes from the row after."""
    src = ends.prompt.register("src", **SHAPE)
    dst = ends.decoders[0].register("dst", **{**BLOCKS, "row_bytes": 20})
    ends.completes(src, [TransferWithCacheKeyConfig(dst.blocks_key, src_layers, dst_layers, 0)], None, blocks, 20)
    dst.expect_pieces(src, 0, blocks, tensors_of(src_layers, dst_layers))
    ends.cluster.check()


def test_a_row_has_no_fourth_piece(ends: Ends) -> None:
    """The row after it has bytes enough, and they are another request's."""
    src = ends.prompt.register("src", **SHAPE)
    dst = ends.decoders[0].register("dst", **{**BLOCKS, "row_bytes": 20})
    config = TransferWithCacheKeyConfig(dst.blocks_key, range(4), range(4))
    task = ends.transfer(src, Gate(ends.prompt, LAYERS), [config], None, [0, 1, 2, 3], 20)
    assert task.synchronize(WAIT_MS) == LLMStatusCode.LLM_PARAM_INVALID
    ends.cluster.check()


def test_layers_go_out_as_they_become_ready(ends: Ends) -> None:
    src, dst = ends.prompt.register("src", **SHAPE), ends.decoders[0].register("dst", **SHAPE)
    gate = Gate(ends.prompt, 0)
    task = ends.transfer(src, gate, [TransferWithCacheKeyConfig(dst.row(0), range(1, 4), range(1, 4))])
    assert task.synchronize(0) == LLMStatusCode.LLM_TIMEOUT
    assert task.get_results(0) == [LLMStatusCode.LLM_TIMEOUT]
    ends.cluster.check()
    gate.open_until(LAYERS)
    assert task.synchronize() == DONE
    dst.expect_rows(src, [(0, 0)], tensors_of(range(1, 4), range(1, 4)))
    assert gate.asked == [1, 2, 3]  # nobody wants layer 0
    ends.cluster.check()


def test_a_layer_that_is_refused_ends_the_task(ends: Ends) -> None:
    src, dst = ends.prompt.register("src", **SHAPE), ends.decoders[0].register("dst", **SHAPE)
    configs = [
        TransferWithCacheKeyConfig(dst.row(0), range(1), range(1)),
        TransferWithCacheKeyConfig(dst.row(1), range(4), range(4)),
        TransferWithCacheKeyConfig(dst.row(2), range(3, 4), range(1)),
    ]
    task = ends.transfer(src, Gate(ends.prompt, LAYERS, refused=2), configs)
    assert task.synchronize(WAIT_MS) == LLMStatusCode.LLM_PARAM_INVALID
    assert task.get_results(WAIT_MS) == [DONE, LLMStatusCode.LLM_PARAM_INVALID, None]
    dst.expect_rows(src, [(0, 0)], tensors_of(range(1), range(1)))
    dst.expect_rows(src, [(0, 1)], tensors_of(range(2), range(2)))
    ends.cluster.check()


def test_a_synchronizer_that_raises_leaves_no_results(ends: Ends) -> None:
    src, dst = ends.prompt.register("src", **SHAPE), ends.decoders[0].register("dst", **SHAPE)
    configs = [TransferWithCacheKeyConfig(dst.row(0), range(4), range(4))]
    task = ends.transfer(src, Gate(ends.prompt, LAYERS, broken=1), configs)
    assert task.synchronize(WAIT_MS) == LLMStatusCode.LLM_FAILED
    assert task.get_results(WAIT_MS) == [None]
    dst.expect_rows(src, [(0, 0)], tensors_of(range(1), range(1)))
    ends.cluster.check()


def test_several_peers_with_layers_of_their_own(cluster: Cluster) -> None:
    ends = Ends(cluster, decoders=3)
    src = ends.prompt.register("src", **SHAPE)
    dsts = [decoder.register("dst", **SHAPE) for decoder in ends.decoders]
    ranges = [(range(4), range(4), 0), (range(1, 3), range(2), 4), (range(2, 4), range(2, 4), 1)]
    ends.completes(
        src, [TransferWithCacheKeyConfig(dst.row(3), s, d, row) for dst, (s, d, row) in zip(dsts, ranges, strict=True)]
    )
    for dst, (src_layers, dst_layers, row) in zip(dsts, ranges, strict=True):
        dst.expect_rows(src, [(row, 3)], tensors_of(src_layers, dst_layers))
    cluster.check()


def test_a_peer_that_dies_ends_the_task(processes: Cluster) -> None:
    ends = Ends(processes, decoders=2)
    src = ends.prompt.register("src", **SHAPE)
    alive, dies = (decoder.register("dst", **SHAPE) for decoder in ends.decoders)
    gate = Gate(ends.prompt, 1)
    configs = [TransferWithCacheKeyConfig(dst.row(0), range(4), range(4)) for dst in (alive, dies)]
    task = ends.transfer(src, gate, configs)
    ends.decoders[1].kill()
    gate.open_until(LAYERS)
    lost = {LLMStatusCode.LLM_FAILED, LLMStatusCode.LLM_TIMEOUT, LLMStatusCode.LLM_NOT_YET_LINK}
    assert task.synchronize(WAIT_MS) in lost
    first, second = task.get_results(WAIT_MS)
    assert first is None
    assert second in lost
    ends.prompt.check()


def test_what_cannot_be_asked_for_starts_no_task(ends: Ends) -> None:
    src, dst = ends.prompt.register("src", **SHAPE), ends.decoders[0].register("dst", **SHAPE)
    blocks, host = ends.prompt.register("blocks", **BLOCKS), ends.prompt.register("host", **SHAPE, placement="HOST")
    odd = ends.prompt.register("odd", **{**SHAPE, "tensors": 7})
    gate = Gate(ends.prompt, LAYERS)
    config = TransferWithCacheKeyConfig(dst.row(0), range(4), range(4))
    beyond = TransferWithCacheKeyConfig(dst.row(0), range(3, 5), range(2))
    start = ends.prompt.manager.transfer_cache_async
    for arguments in (
        (host, gate, [config]),
        (odd, gate, [config]),
        (src, gate, [beyond]),
        (blocks, gate, [config], [0], [0, 1]),
        (blocks, gate, [config], [0]),
        (src, gate, [config], None, [0]),
        (src, gate, [config], None, None, 20),
    ):
        assert failure(start, *arguments) == LLMStatusCode.LLM_PARAM_INVALID, arguments
    with pytest.raises(TypeError, match="only support"):
        start(src, gate, [TransferConfig(2, dst.addrs)])
    ends.cluster.check()


# ---- two-sided mode: raw addresses ----


@pytest.fixture
def two_sided(cluster: Cluster) -> Ends:
    return Ends(cluster, remote_accessible=False)


def row_addrs(cache: RemoteCache, row: int, tensors: range) -> list[int]:
    return [cache.addrs[tensor] + row * cache.spec.row_bytes for tensor in tensors]


def test_row_to_addresses(two_sided: Ends) -> None:
    src, dst = two_sided.prompt.register("src", **SHAPE), two_sided.decoders[0].register("dst", **SHAPE)
    two_sided.completes(
        src,
        [
            TransferConfig(2, row_addrs(dst, 3, range(8)), None, 1),
            TransferConfig(2, row_addrs(dst, 0, range(4)), range(2, 4), 4),
        ],
    )
    dst.expect_rows(src, [(1, 3)])
    dst.expect_rows(src, [(4, 0)], tensors_of(range(2, 4), range(2)))
    two_sided.cluster.check()


def test_blocks_and_pieces_to_addresses(two_sided: Ends) -> None:
    src, blocks = two_sided.prompt.register("src", **SHAPE), two_sided.prompt.register("blocks", **BLOCKS)
    dst = two_sided.decoders[0].register("dst", **BLOCKS)
    pieces = two_sided.decoders[0].register("pieces", **{**BLOCKS, "row_bytes": 20})
    two_sided.completes(blocks, [TransferConfig(2, dst.addrs)], [1, 2, 0], [0, 1, 4])
    dst.expect_rows(blocks, [(1, 0), (2, 1), (0, 4)])
    two_sided.completes(src, [TransferConfig(2, pieces.addrs, None, 3)], None, [4, 1, 0], 20)
    pieces.expect_pieces(src, 3, [4, 1, 0])
    two_sided.cluster.check()


@pytest.mark.parametrize("slip", ["before", "after", "beyond the end", "nowhere"])
def test_addresses_outside_of_every_cache_are_not_written(two_sided: Ends, slip: str) -> None:
    """The guard bytes are as close as it gets; and what a process has not registered is not its peers' business."""
    src, dst = two_sided.prompt.register("src", **SHAPE), two_sided.decoders[0].register("dst", **SHAPE)
    addrs = row_addrs(dst, 0, range(8))
    size = dst.spec.rows * dst.spec.row_bytes
    slips = {"before": addrs[0] - 1, "after": addrs[0] + size, "beyond the end": addrs[0] + size - 47, "nowhere": 8}
    addrs[0] = slips[slip]
    task = two_sided.transfer(src, Gate(two_sided.prompt, LAYERS), [TransferConfig(2, addrs)])
    assert task.synchronize(WAIT_MS) == LLMStatusCode.LLM_PARAM_INVALID
    assert task.get_results(WAIT_MS) == [LLMStatusCode.LLM_PARAM_INVALID]
    two_sided.cluster.check()


def test_addresses_of_a_cache_that_is_gone(two_sided: Ends) -> None:
    src, dst = two_sided.prompt.register("src", **SHAPE), two_sided.decoders[0].register("dst", **SHAPE)
    two_sided.decoders[0].manager.unregister_cache(dst.cache_id)
    task = two_sided.transfer(src, Gate(two_sided.prompt, LAYERS), [TransferConfig(2, dst.addrs)])
    assert task.synchronize(WAIT_MS) == LLMStatusCode.LLM_PARAM_INVALID
    two_sided.cluster.check()


def test_the_end_that_was_linked_to_transfers_too(two_sided: Ends) -> None:
    prompt, decoder = two_sided.prompt, two_sided.decoders[0]
    src, dst = decoder.register("src", **SHAPE), prompt.register("dst", **SHAPE)
    name = decoder.manager.transfer_cache_async(src, Gate(decoder, LAYERS), [TransferConfig(1, dst.addrs)])
    assert decoder.object(name).synchronize(WAIT_MS) == DONE
    dst.expect_rows(src, [(0, 0)])
    two_sided.cluster.check()
