"""Work: what a step of a model that is in flight does to memory. A fence is to hold back until it has ended."""

from __future__ import annotations

import threading
import time
from typing import Any, Protocol

_WORK_S, _PAUSE_S = 0.02, 0.0002
"""On the host: many times what a pull of a block takes. Between two writes the interpreter is the puller's."""
_SIDE, _PRODUCTS = 4096, 32
"""On a device: so many products of matrices of that size come before the write, some ten milliseconds."""


class Work(Protocol):
    def has_ended(self) -> bool:
        """Never waits."""

    def wait(self) -> None: ...


class HostWork:
    """Writes all the while, and once more at its end."""

    def __init__(self, memory: Any, offset: int, data: bytes) -> None:
        begun = threading.Event()

        def run() -> None:
            until = time.monotonic() + _WORK_S
            last = False
            while not last:
                last = time.monotonic() >= until
                memory.write(offset, data)
                begun.set()
                time.sleep(_PAUSE_S)

        self._thread = threading.Thread(target=run)
        self._thread.start()
        begun.wait()

    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()


class StreamWork:
    """Kernels on the stream of the calling thread."""

    def __init__(self, torch: Any, part: Any, value: int) -> None:
        """
        Args:
            part: what is written, of a tensor on a device.
        """
        matrix = torch.ones((_SIDE, _SIDE), dtype=torch.float16, device=part.device)
        part.fill_(value)
        for _ in range(_PRODUCTS):
            matrix = matrix @ matrix
        part.fill_(value)
        runtime = getattr(torch, part.device.type)
        self._event = runtime.Event()
        self._event.record(runtime.current_stream())

    def has_ended(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        self._event.synchronize()
