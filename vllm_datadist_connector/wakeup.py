"""Wakeup: an event that a poll on file descriptors can wait for."""

from __future__ import annotations

import os


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
