"""Starts programs by the fork server (support/fork_server.py), not by exec: servers in seconds, not half a minute."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from console import tail
from serving import ServingError, Started

from support.fork_server import READY

SERVER = Path(__file__).with_name("fork_server.py")
IMPORT_DEADLINE_S = 300.0  # of a machine whose cores others use, too
FORK_DEADLINE_S = 30.0


class ForkedProgram:
    """A forked process, as subprocess.Popen shows one of its own."""

    def __init__(self, pid: int, news: socket.socket) -> None:
        self.pid = pid
        self._news = news
        self._status: int | None = None

    def poll(self) -> int | None:
        return self._hear(0.0)

    def wait(self, timeout: float | None = None) -> int:
        status = self._hear(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(f"forked process {self.pid}", timeout or 0.0)
        return status

    def terminate(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    def _hear(self, timeout_s: float | None) -> int | None:
        if self._status is None and select.select([self._news], [], [], timeout_s)[0]:
            message = self._news.recv(1 << 10)
            # A fork server that is gone has killed what it had forked.
            self._status = json.loads(message)["ended"] if message else -signal.SIGKILL
            self._news.close()
        return self._status


class ForkServer:
    """One fork server, and a `serving.Launch`. It is started by start(), or with the first program; close() ends it and
    all that it has forked."""

    def __init__(
        self,
        python: Path,
        program: str,
        modules: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        late: Collection[str] = (),
    ) -> None:
        """`late` names the variables that the program reads after its imports: others must be those of `env`."""
        self._command = [str(python), "-P", str(SERVER)]
        self._program = [program, *modules]
        self._env = dict(env)
        self._log = log
        self._late = frozenset(late)
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._forked: list[ForkedProgram] = []

    def __call__(self, command: Sequence[str], env: Mapping[str, str], cwd: Path, output: BinaryIO) -> Started:
        changed = {name for name in self._env.keys() | env.keys() if self._env.get(name) != env.get(name)}
        if changed - self._late:
            names = ", ".join(sorted(changed - self._late))
            raise ServingError(f"{names}: may be read by imports, which a forked program shares; spawn this one")
        control = self._started()
        news, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = json.dumps({"command": list(command), "env": dict(env), "cwd": str(cwd)}).encode()
        with theirs:
            socket.send_fds(control, [request], [output.fileno(), theirs.fileno()])
        answer = self._receive(news, FORK_DEADLINE_S)
        if "refused" in answer:
            news.close()
            raise ServingError(f"the fork server has refused: {answer['refused']}")
        program = ForkedProgram(int(answer["pid"]), news)
        self._forked = [each for each in self._forked if each.poll() is None] + [program]
        return program

    def start(self) -> None:
        """Returns at once: it goes on importing, and the first program waits for it."""
        if self._control is not None:
            return
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [*self._command, str(theirs.fileno()), *self._program],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._env,
                pass_fds=[theirs.fileno()],
                process_group=0,  # an interrupt from the terminal is ours: we end the servers before the fork server
            )

    def _started(self) -> socket.socket:
        self.start()
        assert self._control is not None
        if not self._ready and self._read(self._control, IMPORT_DEADLINE_S) != READY:
            self.close()
            raise self._broken()
        self._ready = True
        return self._control

    def _receive(self, news: socket.socket, deadline_s: float) -> dict[str, Any]:
        message = self._read(news, deadline_s)
        if not message:
            raise self._broken()
        answer: dict[str, Any] = json.loads(message)
        return answer

    def _read(self, end: socket.socket, deadline_s: float) -> bytes:
        """One message; nothing if the other end is gone or the deadline passes."""
        return end.recv(1 << 10) if select.select([end], [], [], deadline_s)[0] else b""

    def _broken(self) -> ServingError:
        return ServingError(f"the fork server does not answer; the end of {self._log}:\n{tail(self._log)}")

    def close(self) -> None:
        if self._control is None or self._process is None:
            return
        self._control.close()
        try:
            self._process.wait(FORK_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for program in self._forked:
            program.wait()
        self._forked.clear()
        self._control = self._process = None
        self._ready = False
