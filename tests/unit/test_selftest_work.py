"""Work of the selftest on a device with streams: its event comes after all of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm_datadist_connector.selftest.work import StreamWork


class Torch:
    """Notes what its stream is given."""

    float16 = "float16"

    def __init__(self) -> None:
        self.stream: list[str] = []
        self.npu = SimpleNamespace(Event=lambda: self, current_stream=lambda: "current")
        self.done = False

    def ones(self, size: tuple[int, int], dtype: str, device: Any) -> Torch:
        assert (size[0], dtype, device.type) == (size[1], "float16", "npu")
        return self

    def __matmul__(self, _: object) -> Torch:
        self.stream.append("product")
        return self

    def record(self, stream: str) -> None:
        self.stream.append(f"event on {stream}")

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True


def test_ends_with_its_last_write() -> None:
    torch = Torch()
    part = SimpleNamespace(device=SimpleNamespace(type="npu"), fill_=lambda value: torch.stream.append(f"fill {value}"))
    work = StreamWork(torch, part, 7)
    assert torch.stream[0] == "fill 7"
    assert torch.stream[-3:] == ["product", "fill 7", "event on current"]
    assert not work.has_ended()
    work.wait()
    assert work.has_ended()
