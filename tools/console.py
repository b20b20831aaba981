"""Runs one long command: behind a line of progress, its output in a log whose tail is shown if it fails, or in sight.

Standard library only: it works before the virtual environment exists.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

TAIL_LINES = 40
STOP_GRACE_S = 10.0
SHOWN_GRACE_S = 60.0  # a pytest that is terminated ends its servers first
# A log that is not a terminal gets a line now and then, enough for a CI system to see that the step is alive.
PLAIN_INTERVAL_S = 15.0


class StepError(RuntimeError):
    """A step failed; the message says which, and how the end of its output looked."""


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, indented, for a failure message."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"    (no log: {error})"
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:]) or "    (the log is empty)"


class Progress:
    """One line that shows a step's age: rewritten in place on a terminal, repeated now and then elsewhere."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._start = time.monotonic()
        self._next_plain = PLAIN_INTERVAL_S
        self._terminal = sys.stdout.isatty()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def tick(self) -> None:
        if self._terminal:
            print(f"\r  {self._title} ... {self.seconds:.0f} s", end="", flush=True)
        elif self.seconds >= self._next_plain:
            print(f"  {self._title} ... {self.seconds:.0f} s", flush=True)
            self._next_plain = self.seconds + PLAIN_INTERVAL_S

    def end(self, outcome: str) -> None:
        lead = "\r" if self._terminal else ""
        print(f"{lead}  {self._title}: {outcome} ({self.seconds:.1f} s)      ".rstrip(), flush=True)


@contextmanager
def progress(title: str) -> Iterator[Progress]:
    """Shows `title` from begin to end of the block; the block calls tick() while it waits."""
    shown = Progress(title)
    shown.tick()
    try:
        yield shown
    except BaseException:
        shown.end("failed")
        raise
    shown.end("done")


def stop_group(process: subprocess.Popen[bytes], grace_s: float = STOP_GRACE_S) -> None:
    """Ends a process started in a session of its own, and whatever is left of its group."""
    if process.poll() is None:
        _signal_group(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def _signal_group(leader: int, number: signal.Signals) -> None:
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        return  # nothing is left of the group


def run_step(
    title: str,
    command: Sequence[str],
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> None:
    """Runs `command` to its end; StepError if it fails. Its own session makes it, and its children, stoppable."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with progress(title) as shown, log.open("wb") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, cwd=cwd, start_new_session=True
        )
        try:
            while process.poll() is None:
                shown.tick()
                try:
                    process.wait(1.0)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                stop_group(process)
        if process.returncode != 0:
            raise StepError(f"{title}: exit status {process.returncode}; the end of {log}:\n{tail(log)}")


def run_shown(command: Sequence[str], env: Mapping[str, str], cwd: Path) -> int:
    """Runs a command whose output is the user's to see; returns its exit status."""
    print(f"$ {' '.join(command)}", flush=True)
    process = subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            stop_group(process, SHOWN_GRACE_S)


def exit_status_of(work: Callable[[], int]) -> int:
    """What `work` returns, 1 if a step fails, 130 if the user or SIGTERM ends it; either is said on stderr."""
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # a terminated run ends its servers, as an interrupted one
    try:
        return work()
    except StepError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
