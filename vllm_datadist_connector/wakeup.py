"""Waiting for file descriptors, and Wakeup: an event that such a wait can wait for."""

from __future__ import annotations

import math
import os
import select
import time
from collections.abc import Iterable


class Wakeup:
    """set() from any thread makes fileno() readable until the waiting thread calls clear()."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def set(self) -> None:
        os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        os.eventfd_read(self._fd)

    def __del__(self) -> None:
        # Closed with the last owner: a set() that comes after its owner's close() must not hit a reused descriptor.
        os.close(self._fd)


def wait_readable(fds: Iterable[int], until: float | None) -> set[int]:
    """Those of `fds` that are readable; waits for one, or for time.monotonic() to reach `until`."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    # Rounded up: a poll that ends just before its time would be repeated until the millisecond is over.
    timeout_ms = None if until is None else max(0, math.ceil((until - time.monotonic()) * 1000))
    return {fd for fd, _ in poll.poll(timeout_ms)}
