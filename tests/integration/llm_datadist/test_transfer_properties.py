"""Every transfer of the native API moves the bytes that a slow oracle says, and no other; what it refuses moves none.

Caches of any geometry at odd addresses; all bytes of both memories are compared, so everything beside a tensor is a
canary. Many examples by every transport between two ends of one process, fewer between two processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import transfer_oracle as oracle
from support import transfer_strategies as drawn
from support.shared_ends import PEER, End, Ends, loopback_ends, process_ends
from support.transfer_oracle import CacheModel, Move, RefusedError

from vllm_datadist_connector import _native

SEEDS = st.integers(0, 2**32 - 1)
MODES = {"two-sided": False, "remote-accessible": True}
PLACES = {
    "local": (loopback_ends, 250),
    "cma": (process_ends, 60),
    "tcp": (process_ends, 60),
}
"""Where the peer is by each transport, and how many examples are worth their time there."""

Oracle = Callable[[], list[Move]]


@pytest.fixture(scope="module", params=PLACES)
def transport_of_module(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=MODES)
def ends(request: pytest.FixtureRequest, transport_of_module: str) -> Iterator[Ends]:
    make_ends, _ = PLACES[transport_of_module]
    with make_ends(transport_of_module, MODES[request.param]) as made:
        yield made


@pytest.fixture(scope="module")
def remote_accessible(transport_of_module: str) -> Iterator[Ends]:
    make_ends, _ = PLACES[transport_of_module]
    with make_ends(transport_of_module, True) as made:
        yield made


@pytest.fixture
def examples(transport_of_module: str) -> settings:
    # Building a call is most of an example's time, and shared machines are slow at times: neither is what is tested.
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=PLACES[transport_of_module][1], deadline=None, suppress_health_check=slow)


@contextmanager
def registered(end: End, cache: CacheModel, *keys: _native.Key | None) -> Iterator[int]:
    cache_id = end.register(cache, keys)
    try:
        yield cache_id
    finally:
        end.unregister(cache_id)


def key_of(cache: CacheModel, row: int) -> list[_native.Key | None]:
    """The keys to register a cache with, of which the last one names it, or its row."""
    if cache.layout == "blocks":
        return [(_native.KEY_BLOCKS, 0, 5)]
    return [*[None] * row, (_native.KEY_REQUEST if row % 2 else _native.KEY_PREFIX, 77, 5)]


def compare(ends: Ends, seed: int, call: Callable[[], int], moves: Oracle, pull: bool) -> None:
    """Makes the call: its status and every byte of both memories are what the oracle says."""
    ours, theirs = ends.fill(seed)
    try:
        oracle.apply(moves(), *((theirs, ours) if pull else (ours, theirs)))
        expected, why = _native.LLM_SUCCESS, "it is allowed"
    except RefusedError as refused:
        expected, why = _native.LLM_PARAM_INVALID, str(refused)
    status = call()
    assert status == expected, f"{_native.status_name(status)}, {_native.last_error()!r}: {why}"
    assert ends.ours.memory.tobytes() == ours
    assert ends.theirs.memory.tobytes() == theirs


def test_pull_rows(ends: Ends, examples: settings) -> None:
    @examples
    @given(drawn.pulls_of_rows(), SEEDS)
    def check(pull: drawn.PullRows, seed: int) -> None:
        src, dst, layers = pull.caches.src, pull.caches.dst, pull.layers
        keys = key_of(src, pull.rows[0]) if pull.by_key else []
        with registered(ends.theirs, src, *keys) as src_id, registered(ends.ours, dst) as dst_id:

            def call() -> int:
                named: Any = keys[-1] if pull.by_key else src_id
                row = 0 if pull.by_key else pull.rows[0]
                return ends.engine.pull_rows(
                    PEER, named, dst_id, row, pull.rows[1], pull.size, *vars(layers).values(), *pull.offsets
                )

            any_stride = not ends.remote_accessible
            arguments = (src, dst, layers, pull.rows, pull.size, pull.offsets, any_stride)
            compare(ends, seed, call, lambda: oracle.pull_rows(*arguments), pull=True)

    check()


@pytest.mark.parametrize("pulls", [drawn.pulls_of_blocks, drawn.pulls_into_blocks])
def test_pull_blocks(ends: Ends, examples: settings, pulls: Callable[[], st.SearchStrategy[drawn.PullBlocks]]) -> None:
    @examples
    @given(pulls(), SEEDS)
    def check(pull: drawn.PullBlocks, seed: int) -> None:
        src, dst, layers = pull.caches.src, pull.caches.dst, pull.layers
        keys = key_of(src, pull.src_row) if pull.by_key else []
        with registered(ends.theirs, src, *keys) as src_id, registered(ends.ours, dst) as dst_id:

            def call() -> int:
                named: Any = keys[-1] if pull.by_key else src_id
                row = 0 if pull.by_key else pull.src_row
                return ends.engine.pull_blocks(
                    PEER, named, dst_id, pull.src_blocks, pull.dst_blocks, row, *vars(layers).values()
                )

            arguments = (src, dst, layers, pull.src_blocks, pull.dst_blocks, pull.src_row)
            compare(ends, seed, call, lambda: oracle.pull_blocks(*arguments), pull=True)

    check()


def test_push_layer(remote_accessible: Ends, examples: settings) -> None:
    ends = remote_accessible

    @examples
    @given(drawn.pushes_of_layers(), SEEDS)
    def check(push: drawn.PushLayer, seed: int) -> None:
        src, dst, pushed = push.caches.src, push.caches.dst, push.pushed
        keys = key_of(dst, 0) if push.by_key else []
        with registered(ends.ours, src) as src_id, registered(ends.theirs, dst, *keys) as dst_id:

            def call() -> int:
                named: Any = keys[-1] if push.by_key else dst_id
                return ends.engine.push_layer(
                    src_id, push.layers[0], PEER, named, push.layers[1], *vars(pushed).values(), push.per_layer
                )

            arguments = (src, dst, push.layers, push.per_layer, pushed)
            compare(ends, seed, call, lambda: oracle.push_layer(*arguments), pull=False)

    check()


def test_push_layer_to_addresses(ends: Ends, examples: settings) -> None:
    @examples
    @given(drawn.pushes_to_addrs(), SEEDS)
    def check(push: drawn.PushToAddrs, seed: int) -> None:
        src, dst, pushed = push.caches.src, push.caches.dst, push.pushed
        addrs = [ends.theirs.base + start for start in push.dst_starts]
        with registered(ends.ours, src) as src_id, registered(ends.theirs, dst):

            def call() -> int:
                what = (pushed.src_row, pushed.src_blocks, pushed.dst_blocks, pushed.piece_bytes)
                return ends.engine.push_layer_to_addrs(src_id, push.src_layer, PEER, addrs, *what)

            arguments = (src, [dst], push.src_layer, push.dst_starts, pushed)
            compare(ends, seed, call, lambda: oracle.push_layer_to_addrs(*arguments), pull=False)

    check()


def test_our_own_cache_takes_part_only_if_it_is_remotely_accessible(ends: Ends) -> None:
    """In remote-accessible mode; two-sided mode knows no difference."""
    model = oracle.CacheModel("rows", (2, 8), 4, 8, (16, 48))
    hidden, theirs = ends.ours.register(model, accessible=False), ends.theirs.register(model)
    try:
        pull = ends.engine.pull_rows(PEER, theirs, hidden)
        push = ends.engine.push_layer(hidden, 0, PEER, theirs, 0)
        if ends.remote_accessible:
            assert (pull, push) == (_native.LLM_PARAM_INVALID, _native.LLM_PARAM_INVALID)
        else:
            assert (pull, push) == (_native.LLM_SUCCESS, _native.LLM_FEATURE_NOT_ENABLED)
    finally:
        ends.ours.unregister(hidden)
        ends.theirs.unregister(theirs)
