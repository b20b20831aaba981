"""Another process that stands still, a child or not."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_STOP_S: Final = 60.0
_LOOK_S: Final = 0.002


def stop(pid: int) -> None:
    """Returns once all its threads are stopped: told to stop, they go on for a while on a busy machine."""
    os.kill(pid, signal.SIGSTOP)
    until = time.monotonic() + _STOP_S
    while (states := _states(pid)) != {"T"}:
        if time.monotonic() > until:
            raise TimeoutError(f"threads of process {pid} are {states} {_STOP_S:g} s after SIGSTOP")
        time.sleep(_LOOK_S)


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


def _states(pid: int) -> set[str]:
    lines = [task.joinpath("stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return {line.rpartition(")")[2].split()[0] for line in lines}
