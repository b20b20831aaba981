"""Fences: on the host they have passed; on a device with streams they are an event that is only ever asked."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_datadist_connector import compat
from vllm_datadist_connector.worker.device import StreamDevice, device_of


class Event:
    def __init__(self) -> None:
        self.stream: object = None
        self.done = False

    def record(self, stream: object) -> None:
        self.stream = stream

    def query(self) -> bool:
        assert self.stream is not None, "an event that was never recorded has passed"
        return self.done

    def synchronize(self) -> None:
        raise AssertionError("it may hang a step")


class Runtime:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def Event(self) -> Event:  # noqa: N802
        self.events.append(Event())
        return self.events[-1]

    def current_stream(self) -> str:
        return "vLLM's"


def test_of_the_host_has_passed() -> None:
    assert device_of("cpu").fence().has_passed()


def test_of_a_stream_passes_with_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()

    def streams(device_type: str) -> Any:
        assert device_type == "npu"
        return runtime

    monkeypatch.setattr(compat, "streams", streams)
    device = device_of("npu")
    assert isinstance(device, StreamDevice)
    first, second = device.fence(), device.fence()
    assert [event.stream for event in runtime.events] == ["vLLM's", "vLLM's"]
    assert not first.has_passed()
    runtime.events[0].done = True
    assert first.has_passed()
    assert not second.has_passed()
