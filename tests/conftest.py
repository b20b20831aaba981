"""Fixtures of the engine tests: endpoints and peer processes that end with the test that asked for them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from support.endpoints import Endpoint, Peer, PeerProcess

import vllm_datadist_connector
from vllm_datadist_connector.log_filter import OthersWords

TRANSPORTS = ("local", "cma", "tcp")


@pytest.fixture(autouse=True)
def log_budgets() -> None:
    """What a test logs is not kept back because those before it have used up the minute's lines."""
    for name in list(logging.root.manager.loggerDict):
        if not name.startswith(vllm_datadist_connector.__name__):
            continue
        logger = logging.getLogger(name)
        for spent in [each for each in logger.filters if isinstance(each, OthersWords)]:
            logger.removeFilter(spent)
            logger.addFilter(OthersWords())


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
