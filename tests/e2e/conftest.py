"""Servers of the end-to-end tests. Each module starts what it needs once; the reference serves them all."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "tools", ROOT / "tests"):
    sys.path.insert(0, str(folder))

import equality  # noqa: E402
from serving import Program, ServerSpec  # noqa: E402
from support.reference import Reference  # noqa: E402
from support.servers import (  # noqa: E402
    CHUNK_TOKENS,
    Pair,
    fork,
    kv_transfer,
    make_router,
    make_server,
    model_of,
    running,
)


def _interrupt(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise KeyboardInterrupt


@pytest.fixture(scope="session", autouse=True)
def terminable() -> None:
    """A terminated test run ends its servers, as an interrupted one does."""
    signal.signal(signal.SIGTERM, _interrupt)


@pytest.fixture(scope="session", autouse=True)
def fork_server(terminable: None) -> Iterator[None]:
    """Imports vLLM while models are made."""
    del terminable
    fork.start()
    yield
    fork.close()


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The demo's model, made on this machine if the demo has not run before."""
    return model_of("qwen3")


@pytest.fixture(scope="session")
def single(tiny_model: Path) -> Iterator[Program]:
    """One plain instance without any connector: the oracle. It starts while others do; `reference` waits for it."""
    server = make_server(ServerSpec("single", tiny_model))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def reference(single: Program) -> Reference:
    single.wait_ready()
    return Reference(single.url)


@pytest.fixture(scope="session")
def pair(tiny_model: Path, single: Program) -> Iterator[Pair]:
    """kv_producer and kv_consumer as shipped, the connector found through the entry point.

    D fails a request whose load failed instead of recomputing it: in these tests every failure has to show.
    """
    del single  # asked for so that all three start at once
    fail = kv_transfer("decode", {"kv_load_failure_policy": "fail"}, recv_deadline_s=20, pull_timeout_s=10)
    prefill = ServerSpec("prefill", tiny_model, kv_transfer("prefill"), max_num_batched_tokens=CHUNK_TOKENS)
    decode = ServerSpec("decode", tiny_model, fail, max_num_batched_tokens=CHUNK_TOKENS)
    started = Pair(make_server(prefill), make_server(decode))
    with running(*started.both):
        yield started
        # Where D cannot tell whom to thank (test_hostile_params.py), P's leases end by expiry: others run meanwhile.
        asyncio.run(equality.check_nothing_held(started, deadline_s=2 * equality.LEASE_S))


@pytest.fixture(scope="session")
def router(pair: Pair) -> Iterator[Program]:
    """vllm-router in front of `pair`."""
    program = make_router([pair.prefill], [pair.decode])
    with running(program):
        yield program


@pytest.fixture
def nothing_held_afterwards(pair: Pair) -> Iterator[None]:
    """For use by every test that sends through `pair`: no block outlives its request, but for those left to expire."""
    asyncio.run(equality.check_nothing_held(pair, deadline_s=2 * equality.LEASE_S))
    yield
    asyncio.run(equality.check_nothing_held(pair))
