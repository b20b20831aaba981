"""A process that has imported a program once, and forks itself into that program as often as it is asked to.

    python -P fork_server.py CONTROL_FD PROGRAM [MODULE...]

PROGRAM is `module:function`; each MODULE is imported in advance, or run if it is the path of a .py file. `vllm serve`
imports vLLM in every process that it is made of, some ten seconds of a core each; here all are forked, those that the
program starts by multiprocessing too.

Spoken over CONTROL_FD, a SOCK_SEQPACKET socket (support/fork_client.py is the other end): the server says READY; each
request is a JSON object with the descriptors of a log and of a socket, over which the new process's id comes back, or
why there is none, and in the end its exit status. When the control socket closes, everything that was forked is killed.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import runpy
import selectors
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

READY = b"ready"
MAX_REQUEST_BYTES = 1 << 17
# Servers are ended by those who asked for them: more at once than any module of tests starts is a leak.
MAX_ALIVE = 24


@dataclass(frozen=True)
class Forked:
    """A process, the leader of its group, and who wants to hear how it ends."""

    pid: int
    ended: int
    """pidfd: readable when the process has ended."""
    asker: socket.socket

    def tell_end(self) -> None:
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        with suppress(OSError):  # nobody asks any more
            self.asker.send(json.dumps({"ended": status}).encode())
        self.close()

    def close(self) -> None:
        os.close(self.ended)
        self.asker.close()


def fork_everything() -> None:
    """Makes multiprocessing fork whenever it is told to spawn: vLLM's CPU platform insists on spawning."""
    get_context = multiprocessing.get_context

    def forking(method: str | None = None) -> Any:
        return get_context("fork" if method == "spawn" else method)

    multiprocessing.get_context = forking


def check_alone() -> None:
    """A fork copies the calling thread only: locks that others hold would stay locked for ever."""
    threads = {
        task: open(f"/proc/self/task/{task}/comm", encoding="utf-8").read().strip()  # noqa: SIM115
        for task in os.listdir("/proc/self/task")
    }
    if len(threads) > 1:
        raise SystemExit(f"imports have started threads, and a process with threads cannot be forked: {threads}")


class ForkServer:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._alive: dict[int, Forked] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)

    def serve(self) -> dict[str, Any]:
        """Returns in the forked processes only: what each of them is to be."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is not self._control:
                    self._end(self._alive.pop(key.fd))
                    continue
                message, descriptors, _, _ = socket.recv_fds(self._control, MAX_REQUEST_BYTES, 2)
                if not message:
                    self._kill_all()
                    raise SystemExit(0)
                request: dict[str, Any] = json.loads(message)
                if self._fork(*descriptors):
                    return request

    def _fork(self, log: int, asker_descriptor: int) -> bool:
        """True in the new process."""
        asker = socket.socket(fileno=asker_descriptor)
        if len(self._alive) >= MAX_ALIVE:
            asker.send(json.dumps({"refused": f"{len(self._alive)} processes are alive, the limit"}).encode())
            asker.close()
            os.close(log)
            return False
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            asker.close()
            self._leave()
            return True
        with suppress(OSError):  # either of us may be the first, and the other may have ended
            os.setpgid(pid, pid)
        os.close(log)
        forked = Forked(pid, os.pidfd_open(pid), asker)
        self._alive[forked.ended] = forked
        self._selector.register(forked.ended, selectors.EVENT_READ)
        with suppress(OSError):
            asker.send(json.dumps({"pid": pid}).encode())
        return False

    def _leave(self) -> None:
        """A copy of these in another process would keep their other ends from seeing that we are gone."""
        self._selector.close()
        self._control.close()
        for forked in self._alive.values():
            forked.close()
        self._alive.clear()

    def _end(self, forked: Forked) -> None:
        self._selector.unregister(forked.ended)
        forked.tell_end()

    def _kill_all(self) -> None:
        for forked in self._alive.values():
            with suppress(ProcessLookupError):
                os.killpg(forked.pid, signal.SIGKILL)
        for forked in self._alive.values():
            forked.tell_end()


def become(request: dict[str, Any]) -> None:
    """Takes over what a new process would have got from its parent."""
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = request["command"]


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    module, _, function = sys.argv[2].partition(":")
    fork_everything()
    program: Callable[[], Any] = getattr(importlib.import_module(module), function)
    for name in sys.argv[3:]:
        if name.endswith(".py"):
            runpy.run_path(name)
        else:
            importlib.import_module(name)
    check_alone()
    gc.collect()
    gc.freeze()  # what is never looked at by a collector stays shared
    control.send(READY)
    become(ForkServer(control).serve())
    sys.exit(program())


if __name__ == "__main__":
    main()
