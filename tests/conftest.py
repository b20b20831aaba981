"""Fixtures of the engine tests: endpoints and peer processes that end with the test that asked for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from support.endpoints import Endpoint, Peer, PeerProcess

TRANSPORTS = ("local", "cma", "tcp")


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def resources() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def make_endpoint(resources: ExitStack) -> Callable[..., Endpoint]:
    """Endpoint(...) in this process, finalized after the test."""
    return lambda **settings: resources.enter_context(Endpoint(**settings))


@pytest.fixture
def make_peer(resources: ExitStack) -> Callable[..., Peer]:
    """A peer that can be reached by the named transport: for `local` in this process, else in one of its own."""

    def make(transport: str, **settings: int) -> Peer:
        options = {"datadist.Transport": transport}
        if transport == "local":
            return resources.enter_context(Endpoint(options=options, **settings))
        return resources.enter_context(PeerProcess(options=options, **settings))

    return make
