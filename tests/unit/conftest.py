"""Hypothesis: no deadline per example, because other processes share the machine; a hang is the test run's to end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings
from support.counting_keeper import CountingKeeper

settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")


@pytest.fixture
def keeper(monkeypatch: pytest.MonkeyPatch) -> Iterator[CountingKeeper]:
    """What the consumer side holds of P's leases, in place of the thread that would tell P; none may be left."""
    keeper = CountingKeeper()
    monkeypatch.setattr("vllm_datadist_connector.scheduler.consumer.open_keeper", lambda *_: keeper)
    yield keeper
    assert not +keeper.users, "a lease was not released"
