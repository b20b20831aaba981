"""Handle of a party, in a process that this one started or behind the other host's selftest."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import msgspec

T = TypeVar("T")
PARTY = (sys.executable, "-m", f"{__package__}.party")
ANSWER_S = 60.0
_MAX_ANSWER = 1 << 20
_READ_BYTES = 1 << 16
_TOLD_BYTES = 400
_END_S = 10.0


class PartyLostError(RuntimeError):
    """The party's process ended, or said nothing in time."""


class PartyError(RuntimeError):
    """The party raised: the test, or what it needs, is broken; says what."""


class Wire(Protocol):
    """Lines to a party and from it."""

    def send(self, line: bytes) -> None: ...
    def receive(self, until: float) -> bytes | None:
        """Bytes that came; none once the party has ended, None if nothing came in time."""

    def kill(self) -> None:
        """Ends the process at once, and returns when it has ended. Idempotent."""

    def how_it_ended(self) -> str: ...


class Remote:
    """Asks one thing after the other."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._unread = b""

    def ask(self, do: str, kind: type[T], *, within_s: float = ANSWER_S, **args: object) -> T:
        """
        Raises:
            PartyLostError, PartyError
        """
        self.begin(do, **args)
        return self.end(kind, within_s)

    def begin(self, do: str, **args: object) -> None:
        """Asks and does not wait; end() has to follow."""
        with contextlib.suppress(OSError):  # it has ended: the answer will say so
            self._wire.send(json.dumps({"do": do, "args": msgspec.to_builtins(args)}).encode() + b"\n")

    def end(self, kind: type[T], within_s: float = ANSWER_S) -> T:
        answer: dict[str, Any] = json.loads(self._line(time.monotonic() + within_s))
        if "error" in answer:
            raise PartyError(str(answer["error"]))
        return msgspec.convert(answer.get("value"), type=kind)

    def kill(self) -> None:
        self._wire.kill()

    def _line(self, until: float) -> bytes:
        while b"\n" not in self._unread:
            came = self._wire.receive(until)
            if came is None:
                raise PartyLostError("no answer in time: a call of the provider's does not return")
            if not came or len(self._unread) > _MAX_ANSWER:
                raise PartyLostError(self._wire.how_it_ended())
            self._unread += came
        line, _, self._unread = self._unread.partition(b"\n")
        return line


class ProcessWire:
    """A party on this host."""

    def __init__(self, command: Sequence[str] = PARTY) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed in kill()
        self.process = subprocess.Popen(  # noqa: S603 - ourselves
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
        )
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("a process without pipes")
        self._requests, self._answers = self.process.stdin, self.process.stdout

    def send(self, line: bytes) -> None:
        self._requests.write(line)
        self._requests.flush()

    def receive(self, until: float) -> bytes | None:
        ready, _, _ = select.select([self._answers], [], [], max(0.0, until - time.monotonic()))
        return os.read(self._answers.fileno(), _READ_BYTES) if ready else None

    def kill(self) -> None:
        if self._said.closed:
            return
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):  # what it has not read is of no use any more
            self._requests.close()
        self._answers.close()
        self._said.close()

    def how_it_ended(self) -> str:
        try:
            status = self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return "the process of the provider hangs while it ends"
        how = f"by signal {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        self._said.seek(0, 2)
        self._said.seek(max(0, self._said.tell() - _TOLD_BYTES))
        said = self._said.read().decode(errors="replace").strip()
        return f"the process of the provider ended {how}{f': {said}' if said else ''}"


class SocketWire:
    """A party behind the selftest of another host, which relays its lines and kills it when it is told to."""

    KILL = b'{"do": "kill"}\n'
    KILLED = b'{"value": "killed"}\n'

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, line: bytes) -> None:
        self._connection.sendall(line)

    def receive(self, until: float) -> bytes | None:
        ready, _, _ = select.select([self._connection], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            return None
        try:
            return self._connection.recv(_READ_BYTES)
        except OSError:
            return b""

    def kill(self) -> None:
        if self._connection.fileno() < 0:
            return
        with contextlib.suppress(OSError):
            self._connection.sendall(self.KILL)
            until, came = time.monotonic() + ANSWER_S, b""
            while not came.endswith(self.KILLED) and (more := self.receive(until)):
                came += more
        self._connection.close()

    def how_it_ended(self) -> str:
        return "the process of the provider on the other host ended, or the connection to it"
