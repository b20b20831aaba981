"""Fixtures of the driver's tests: P's and D's that end with the test that asked for them.

Imported only where they are used: P's side needs vLLM, which takes longer to import than the engine's own tests to run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from support.consumer import Consumer
    from support.giver_process import GiverProcess
    from support.producer_process import ProducerProcess

P_CLUSTER = 100


@pytest.fixture
def open_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """For engines made after it, here and in child processes: who comes by a relay comes over TCP, without a key."""
    monkeypatch.setenv("DATADIST_INSECURE", "1")


@pytest.fixture
def start_producer(resources: ExitStack) -> Callable[..., ProducerProcess]:
    from support.producer_process import ProducerProcess

    def start(cluster_id: int = P_CLUSTER, **settings: Any) -> ProducerProcess:
        producer = ProducerProcess(cluster_id, **settings)
        resources.callback(producer.kill)
        return producer

    return start


@pytest.fixture
def start_consumer(resources: ExitStack) -> Callable[..., Consumer]:
    from support.consumer import Consumer

    return lambda **settings: resources.enter_context(closing(Consumer(**settings)))


@pytest.fixture
def producer(start_producer: Callable[..., ProducerProcess]) -> ProducerProcess:
    return start_producer()


@pytest.fixture
def consumer(start_consumer: Callable[..., Consumer]) -> Consumer:
    return start_consumer()


@pytest.fixture(params=["pull", "push"])
def mover(request: pytest.FixtureRequest) -> str:
    """Of a hand-off: D, or P into blocks that D has offered."""
    return str(request.param)


@pytest.fixture
def start_giver(resources: ExitStack, mover: str) -> Callable[..., GiverProcess]:
    from support.giver_process import GiverProcess

    def start(cluster_id: int = P_CLUSTER, **settings: Any) -> GiverProcess:
        giver = GiverProcess(cluster_id, **({"pushes": mover == "push"} | settings))
        resources.callback(giver.kill)
        return giver

    return start


@pytest.fixture
def giver(start_giver: Callable[..., GiverProcess]) -> GiverProcess:
    return start_giver()


@pytest.fixture
def start_taker(start_consumer: Callable[..., Consumer], mover: str) -> Callable[..., Consumer]:
    def start(**settings: Any) -> Consumer:
        return start_consumer(access="granted" if mover == "push" else "none", **settings)

    return start


@pytest.fixture
def taker(start_taker: Callable[..., Consumer]) -> Consumer:
    return start_taker()
