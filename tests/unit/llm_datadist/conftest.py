"""An LLMDataDist whose engine only notes what it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.noted_engine import NotedEngine

from vllm_datadist_connector import _native
from vllm_datadist_connector.llm_datadist import LLMDataDist, LLMRole
from vllm_datadist_connector.llm_datadist.v2 import llm_datadist as module


@pytest.fixture(autouse=True)
def away_from_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`python -c` looks in its working directory first: there it must not find the sources, which lack _native."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[NotedEngine]:
    engine = NotedEngine()
    monkeypatch.setattr(module, "ManagedDataDist", engine.make)
    monkeypatch.setattr(_native, "last_error", lambda: "the reason")
    yield engine
    module._shutdown_handler()


@pytest.fixture
def start(engine: NotedEngine) -> Callable[..., LLMDataDist]:
    """An initialised LLMDataDist of cluster 1."""

    def started(options: dict[str, str], role: LLMRole = LLMRole.PROMPT) -> LLMDataDist:
        datadist = LLMDataDist(role, 1)
        datadist.init(options)
        engine.take()
        return datadist

    return started
