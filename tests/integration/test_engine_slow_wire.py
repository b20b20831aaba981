"""Transfers that take long: what their timeout covers, and that unlinking waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import pytest
from support.endpoints import Endpoint, PeerProcess, cluster_info
from support.slow_relay import SlowRelay

from vllm_datadist_connector import _native

LAYERS = 8
SIZES = {"tensors": 2 * LAYERS, "blocks": 1, "block_bytes": 128 * 1024}
LAYER_BYTES = 2 * SIZES["block_bytes"]
LAYER_S = 0.4
PATIENCE_MS = 30_000

SlowLink = Callable[[int], tuple[Endpoint, PeerProcess, SlowRelay]]


@pytest.fixture
def slow_link(
    open_to_all: None,  # noqa: ARG001
    make_endpoint: Callable[..., Endpoint],
    make_peer: Callable[..., PeerProcess],
    resources: ExitStack,
) -> SlowLink:
    """slow_link(transfer timeout in ms): two ends and a wire between them that moves a layer in LAYER_S."""

    def make(wait_ms: int) -> tuple[Endpoint, PeerProcess, SlowRelay]:
        options = {
            "datadist.Transport": "tcp",
            "datadist.TcpStreams": "1",
            "llm.SyncKvCacheWaitTime": str(wait_ms),
        }
        mine = make_endpoint(cluster_id=1, options=options, **SIZES)
        peer = make_peer("tcp", cluster_id=2, **SIZES)
        relay = resources.enter_context(SlowRelay(peer.port, LAYER_BYTES / LAYER_S))
        peer.port = relay.port
        mine.link(peer)
        return mine, peer, relay

    return make


def test_the_timeout_is_that_of_each_layer_of_a_push_and_of_a_whole_pull(slow_link: SlowLink) -> None:
    wait_ms = 2500  # six times what a layer takes, and less than all of them
    mine, peer, _ = slow_link(wait_ms)
    started = time.monotonic()
    assert mine.push(peer, [0], [0]) == _native.LLM_SUCCESS, _native.last_error()
    assert time.monotonic() - started > wait_ms / 1000
    np.testing.assert_array_equal(peer.read_memory(), mine.memory)
    assert mine.pull(peer, [0], [0]) == _native.LLM_TIMEOUT


@pytest.mark.parametrize("force", [False, True])
def test_unlinking_waits_for_the_transfer_that_runs(force: bool, slow_link: SlowLink) -> None:
    mine, peer, relay = slow_link(PATIENCE_MS)
    theirs = peer.read_memory()
    statuses: list[int] = []
    before = relay.moved
    pull = threading.Thread(target=lambda: statuses.append(mine.pull(peer, [0], [0])))
    pull.start()
    assert relay.wait_until_moved(before + LAYER_BYTES, PATIENCE_MS / 1000)
    assert mine.datadist.unlink_clusters([cluster_info(peer)], PATIENCE_MS, force) == (
        _native.LLM_SUCCESS,
        [_native.LLM_SUCCESS],
    )
    np.testing.assert_array_equal(mine.memory, theirs)
    pull.join()
    assert statuses == [_native.LLM_SUCCESS]
    assert mine.pull(peer, [0], [0]) == _native.LLM_NOT_YET_LINK
