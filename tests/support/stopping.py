"""A child process that stands still."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


def stop(pid: int) -> None:
    """Returns once the child is stopped: one that is only told to stop goes on for a while on a busy machine."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


def resume(pid: int) -> None:
    os.kill(pid, signal.SIGCONT)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """It goes on afterwards, also where a test has failed: what closes it would wait for long."""
    stop(pid)
    try:
        yield
    finally:
        resume(pid)
