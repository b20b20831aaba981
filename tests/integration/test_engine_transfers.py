"""Pull and push between two endpoints, byte for byte against an oracle, over every transport."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from support.endpoints import LOOPBACK, Endpoint, Memory, Peer, copy_blocks
from support.slow_relay import SlowRelay

from vllm_datadist_connector import _native

BLOCKS = 64
SIZES = {"tensors": 6, "blocks": BLOCKS, "block_bytes": 4096 + 8}

Ends = tuple[Endpoint, Peer]


@pytest.fixture
def ends(transport: str, make_endpoint: Callable[..., Endpoint], make_peer: Callable[..., Peer]) -> Ends:
    mine = make_endpoint(cluster_id=1, options={"datadist.Transport": transport}, **SIZES)
    peer = make_peer(transport, cluster_id=2, **SIZES)
    mine.link(peer)
    return mine, peer


def _random_lists(random: np.random.Generator) -> tuple[list[int], list[int]]:
    """Neighbours, gaps, repetitions; destinations repeat too, where the last write must win."""
    count = int(random.integers(1, 2 * BLOCKS))
    src = random.integers(0, BLOCKS, count)
    dst = random.integers(0, BLOCKS, count)
    if random.random() < 0.5:  # runs
        src, dst = np.sort(src), np.sort(dst)
    return src.tolist(), dst.tolist()


def _random_layers(random: np.random.Generator) -> tuple[dict[str, Any], slice, slice]:
    """Keyword arguments of the call, and the tensors that they select on the source and on the destination."""
    per_layer = int(random.choice([1, 2, 3]))
    layers = SIZES["tensors"] // per_layer
    count = int(random.integers(1, layers + 1))
    src, dst = (int(random.integers(0, layers - count + 1)) for _ in range(2))
    arguments = {
        "src_layer_range": (src, src + count - 1),
        "dst_layer_range": (dst, dst + count - 1),
        "tensor_num_per_layer": per_layer,
    }
    selected = [slice(first * per_layer, (first + count) * per_layer) for first in (src, dst)]
    return arguments, selected[0], selected[1]


def _copy_layers(
    src: Memory, dst: Memory, blocks: tuple[list[int], list[int]], src_tensors: slice, dst_tensors: slice
) -> None:
    copy_blocks(src[src_tensors], dst[dst_tensors], *blocks)


@pytest.mark.parametrize("seed", range(8))
def test_pull(ends: Ends, seed: int) -> None:
    mine, peer = ends
    random = np.random.default_rng(seed)
    theirs, expected = peer.read_memory(), mine.read_memory()
    for _ in range(6):
        blocks = _random_lists(random)
        assert mine.pull(peer, *blocks) == _native.LLM_SUCCESS, _native.last_error()
        copy_blocks(theirs, expected, *blocks)
        arguments, src_tensors, dst_tensors = _random_layers(random)
        assert mine.pull(peer, *blocks, **arguments) == _native.LLM_SUCCESS, _native.last_error()
        _copy_layers(theirs, expected, blocks, src_tensors, dst_tensors)
    np.testing.assert_array_equal(mine.memory, expected)
    np.testing.assert_array_equal(peer.read_memory(), theirs)


@pytest.mark.parametrize("seed", range(8))
def test_push(ends: Ends, seed: int) -> None:
    mine, peer = ends
    random = np.random.default_rng(seed)
    ours, expected = mine.read_memory(), peer.read_memory()
    for _ in range(6):
        blocks = _random_lists(random)
        assert mine.push(peer, *blocks) == _native.LLM_SUCCESS, _native.last_error()
        copy_blocks(ours, expected, *blocks)
        arguments, src_tensors, dst_tensors = _random_layers(random)
        assert mine.push(peer, *blocks, **arguments) == _native.LLM_SUCCESS, _native.last_error()
        _copy_layers(ours, expected, blocks, src_tensors, dst_tensors)
    np.testing.assert_array_equal(peer.read_memory(), expected)
    np.testing.assert_array_equal(mine.memory, ours)


def test_the_end_that_was_linked_to_can_initiate(ends: Ends) -> None:
    mine, peer = ends
    theirs = peer.read_memory()
    copy_blocks(mine.memory, theirs, [3, 4, 9], [9, 3, 4])
    expected = mine.read_memory()
    copy_blocks(theirs, expected, [0, 1], [60, 61])
    pulled = peer.call("pull_kv_blocks", 1, mine.cache_id, peer.cache_id, [3, 4, 9], [9, 3, 4])
    assert pulled == _native.LLM_SUCCESS
    pushed = peer.call("push_kv_blocks", peer.cache_id, 1, mine.cache_id, [0, 1], [60, 61], SIZES["tensors"])
    assert pushed == _native.LLM_SUCCESS
    np.testing.assert_array_equal(peer.read_memory(), theirs)
    np.testing.assert_array_equal(mine.memory, expected)


def test_the_link_reports_its_transport_and_bytes(ends: Ends, transport: str) -> None:
    mine, peer = ends
    assert mine.pull(peer, [0, 5], [1, 2]) == _native.LLM_SUCCESS
    assert mine.push(peer, [0], [1]) == _native.LLM_SUCCESS
    status, report = mine.datadist.query_link(peer.cluster_id)
    assert status == _native.LLM_SUCCESS
    assert report is not None
    per_block = SIZES["tensors"] * SIZES["block_bytes"]
    assert (report.alive, report.transport) == (True, transport)
    assert (report.bytes_pulled, report.bytes_pushed) == (2 * per_block, per_block)
    assert mine.datadist.query_link(99) == (_native.LLM_NOT_YET_LINK, None)


def test_wrong_blocks_and_caches_are_refused_and_move_nothing(ends: Ends) -> None:
    mine, peer = ends
    before, theirs = mine.read_memory(), peer.read_memory()
    for blocks in ([BLOCKS], [0]), ([0], [BLOCKS]), ([0, 2**40], [0, 1]), ([], []), ([0], [0, 1]):
        assert mine.pull(peer, *blocks) == _native.LLM_PARAM_INVALID, blocks
        assert _native.last_error()
        assert mine.push(peer, *blocks) == _native.LLM_PARAM_INVALID, blocks
    unknown = mine.datadist.pull_kv_blocks(peer.cluster_id, 77, mine.cache_id, [0], [0])
    assert unknown == _native.LLM_KV_CACHE_NOT_EXIST
    assert mine.datadist.pull_kv_blocks(99, 1, mine.cache_id, [0], [0]) == _native.LLM_NOT_YET_LINK
    np.testing.assert_array_equal(mine.memory, before)
    np.testing.assert_array_equal(peer.read_memory(), theirs)
    assert mine.pull(peer, [0], [0]) == _native.LLM_SUCCESS


def test_unlinked_and_linked_again(ends: Ends) -> None:
    mine, peer = ends
    info = _native.ClusterInfo(peer.cluster_id, [("127.0.0.1", peer.port)], [("127.0.0.1", 0)])
    assert mine.datadist.link_clusters([info])[1] == [_native.LLM_ALREADY_LINK]
    assert mine.datadist.unlink_clusters([info], 10_000) == (_native.LLM_SUCCESS, [_native.LLM_SUCCESS])
    assert mine.pull(peer, [0], [0]) == _native.LLM_NOT_YET_LINK
    mine.link(peer)
    assert mine.pull(peer, [0], [0]) == _native.LLM_SUCCESS


@pytest.mark.usefixtures("open_to_all")
def test_a_dial_that_arrives_late_keeps_the_link_that_crossed_it(make_endpoint: Callable[..., Endpoint]) -> None:
    """What the lower end moves over its link by then would be lost if the other's dial replaced it."""
    lower, higher = make_endpoint(cluster_id=1, **SIZES), make_endpoint(cluster_id=2, **SIZES)
    gate = threading.Event()
    with SlowRelay(lower.port, gate=gate) as relay, ThreadPoolExecutor(1) as pool:
        late_info = _native.ClusterInfo(lower.cluster_id, [(LOOPBACK, relay.port)], [(LOOPBACK, 0)])
        late = pool.submit(higher.datadist.link_clusters, [late_info], 20_000)
        assert relay.arrived.wait(20)
        lower.link(higher)
        gate.set()
        assert late.result()[1] == [_native.LLM_ALREADY_LINK]
    for here, there in (lower, higher), (higher, lower):
        assert here.pull(there, [0], [0]) == _native.LLM_SUCCESS


def test_queue_runs_many_operations_to_several_peers(
    transport: str, make_endpoint: Callable[..., Endpoint], make_peer: Callable[..., Peer]
) -> None:
    peers = [make_peer(transport, cluster_id=10 + i, **SIZES) for i in range(2)]
    blocks = 300
    mine = make_endpoint(cluster_id=1, options={"datadist.Transport": transport}, **{**SIZES, "blocks": blocks})
    queue = _native.TransferQueue(mine.datadist, threads=3)
    for peer in peers:
        queue.submit_link(
            _native.ClusterInfo(peer.cluster_id, [("127.0.0.1", peer.port)], [("127.0.0.1", 0)]), 20_000, 20_000
        )
    memories = [peer.read_memory() for peer in peers]
    expected = mine.read_memory()
    for block in range(blocks):
        chosen = block % len(peers)
        queue.submit_pull_blocks(
            peers[chosen].cluster_id, peers[chosen].cache_id, mine.cache_id, [block % BLOCKS], [block], 60_000
        )
        copy_blocks(memories[chosen], expected, [block % BLOCKS], [block])
    completions: list[_native.Completion] = []
    while len(completions) < blocks + len(peers):
        assert select.select([queue], [], [], 60)[0], f"only {len(completions)} completed"
        completions += queue.poll()
    assert {c.status for c in completions} == {_native.LLM_SUCCESS}, {c.error for c in completions}
    assert len({c.id for c in completions}) == blocks + len(peers)
    queue.close()
    np.testing.assert_array_equal(mine.memory, expected)
