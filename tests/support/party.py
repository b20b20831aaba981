"""An engine in a process of its own whose memory the test sees at any time, also while that process is stopped or dead.

An oracle stands beside the memory: `expected` is what every byte must be, guards included.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import resource
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from support import stopping
from support.wire import OWN, Wire

Bytes = npt.NDArray[np.uint8]
Key = tuple[str, int]
"""("request" or "prefix", id)."""

TENSORS, BLOCKS, BLOCK_BYTES = 4, 1024, 4096
GUARD = 4096
PATIENCE_MS = 20_000
"""Of calls that must succeed, however busy the machine is."""
ENVIRONMENT = {**os.environ, "DATADIST_INSECURE": "1"}
"""Behind a wire the engines meet by TCP, where nobody vouches for anybody; these tests are not about who is let in."""
_ANSWER_S = 60.0
_EXIT_S = 15.0  # less than PATIENCE_MS, which what is in flight may wait
_PAUSE_S = 0.002
_TURN_S = 0.05
"""For which one thread may keep the others from reading their answers."""


def engine_options(
    transport: str, *, heartbeat_ms: int, transfer_ms: int = PATIENCE_MS, two_sided: bool = False, port: int = 0
) -> dict[str, str]:
    """The one place that says with what options the engines of fault tests and soaks are made."""
    return {
        "llm.DeviceId": "0",
        "llm.ListenIpInfo": f"{OWN}:{port}",
        "llm.SyncKvCacheWaitTime": str(transfer_ms),
        "llm.EnableRemoteCacheAccessible": "0" if two_sided else "1",
        "datadist.Transport": transport,
        "datadist.HeartbeatMs": str(heartbeat_ms),
        "datadist.TransferThreads": "1",
        "datadist.TcpStreams": "1",
    }


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = _ANSWER_S) -> None:
    """For what other processes do and nobody tells."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(_PAUSE_S)


@dataclass(frozen=True)
class Answer:
    status: str
    why: str
    seconds: float
    value: Any
    fds: tuple[int, ...] = ()


class Call:
    def __init__(self, party: Party, number: int) -> None:
        self._party = party
        self._number = number

    def result(self) -> Answer:
        return self._party.answer(self._number)

    @property
    def ended(self) -> bool:
        return self._party.has_answer(self._number)


class Party:
    def __init__(self, cluster_id: int, options: dict[str, str], seed: int, keys: Sequence[Key] = ()) -> None:
        """keys[i] names row i."""
        self.cluster_id = cluster_id
        self._answers: dict[int, Answer] = {}
        self._unread = b""
        self._lock = threading.Lock()  # a wire asks on a thread of its own
        self._asked = 0
        self._make_memory(seed)
        ours, theirs = socket.socketpair()
        self._socket = ours
        settings = {
            "cluster_id": cluster_id,
            "host": OWN,
            "options": options,
            "blocks": BLOCKS,
            "block_bytes": BLOCK_BYTES,
            "offsets": self._offsets,
        }
        with theirs:
            fds = (theirs.fileno(), self._memory)
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("party_main.py")), *map(str, fds), json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                pass_fds=fds,
                env=ENVIRONMENT,
            )
        try:
            self.port: int = self.ask("port").value
            self._keys = list(keys)
            self.register()
        except Exception:
            self.kill()
            raise

    def register(self) -> None:
        """Anew, under another id."""
        self.cache_id: int = self.ask("register", self._keys).value

    def _make_memory(self, seed: int) -> None:
        tensor_bytes = BLOCKS * BLOCK_BYTES
        self._offsets = [GUARD + tensor * (tensor_bytes + GUARD) for tensor in range(TENSORS)]
        size = self._offsets[-1] + tensor_bytes + GUARD
        self._memory = os.memfd_create(f"party {self.cluster_id}")
        os.truncate(self._memory, size)
        self._mapped = mmap.mmap(self._memory, size)
        self.unsettled: list[int] = []
        """Blocks that a transfer which is under way, or has failed, may write."""
        self.whole: Bytes = np.frombuffer(self._mapped, dtype=np.uint8)
        self.whole[:] = np.frombuffer(np.random.default_rng(seed).bytes(size), dtype=np.uint8)
        self.expected: Bytes = self.whole.copy()

    def tensors(self, whole: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """[block, byte] of each, views."""
        size = BLOCKS * BLOCK_BYTES
        return [whole[offset : offset + size].reshape(BLOCKS, BLOCK_BYTES) for offset in self._offsets]

    # ---- memory ----

    def fill(self, blocks: Sequence[int], value: int) -> None:
        """So that a transfer that moves nothing is seen."""
        for whole in (self.whole, self.expected):
            for tensor in self.tensors(whole):
                tensor[list(blocks)] = value

    def forget_pages(self, blocks: int) -> None:
        """The first blocks are zeros that the kernel has yet to find memory for: who writes there takes his time."""
        size = blocks * BLOCK_BYTES
        for offset in self._offsets:
            self._mapped.madvise(mmap.MADV_REMOVE, offset, size)
            self.expected[offset : offset + size] = 0

    def expect(self, owner: Party, src: Sequence[int], dst: Sequence[int]) -> None:
        for ours, theirs in zip(self.tensors(self.expected), owner.tensors(owner.expected), strict=True):
            ours[list(dst)] = theirs[list(src)]

    def settle(self) -> None:
        """From now on nobody writes the unsettled blocks."""
        self.accept(self.unsettled)
        self.unsettled = []

    def accept(self, blocks: Sequence[int]) -> None:
        """As they are: a transfer into them has failed."""
        for now, expected in zip(self.tensors(self.whole), self.tensors(self.expected), strict=True):
            expected[list(blocks)] = now[list(blocks)]

    def wrong_bytes(self, blocks: Sequence[int]) -> int:
        pairs = zip(self.tensors(self.whole), self.tensors(self.expected), strict=True)
        return sum(int(np.count_nonzero(now[list(blocks)] != expected[list(blocks)])) for now, expected in pairs)

    def check(self) -> None:
        wrong = self.whole != self.expected
        for tensor in self.tensors(wrong):
            tensor[self.unsettled] = False
        if wrong.any():
            count, first = np.count_nonzero(wrong), np.argmax(wrong)
            raise AssertionError(f"cluster {self.cluster_id}: {count} bytes are wrong, from {first} on")

    # ---- calls ----

    def start(self, do: str, *args: Any) -> Call:
        with self._lock:
            if self._socket.fileno() < 0:
                raise ConnectionResetError(f"cluster {self.cluster_id} was ended")
            self._asked += 1
            number = self._asked
            self._socket.sendall(json.dumps({"id": number, "do": do, "args": args}).encode() + b"\n")
        return Call(self, number)

    def ask(self, do: str, *args: Any) -> Answer:
        """What must succeed."""
        answer = self.start(do, *args).result()
        if answer.status != "LLM_SUCCESS":
            raise AssertionError(f"cluster {self.cluster_id}, {do}{args}: {answer.status}: {answer.why}")
        return answer

    def ask_socket(self, do: str, *args: Any) -> socket.socket:
        """OSError where the process could not make one."""
        answer = self.start(do, *args).result()
        if not answer.fds:
            raise ConnectionRefusedError(answer.why)
        return socket.socket(fileno=answer.fds[0])

    def answer(self, number: int, timeout_s: float = _ANSWER_S) -> Answer:
        end = time.monotonic() + timeout_s
        while True:
            with self._lock:
                if number in self._answers:
                    return self._answers.pop(number)
                self._read(min(_TURN_S, max(end - time.monotonic(), 0)))
            if time.monotonic() > end:
                raise TimeoutError(f"cluster {self.cluster_id}: no answer within {timeout_s:g} s")

    def has_answer(self, number: int) -> bool:
        with self._lock:
            while number not in self._answers and self._read(0):
                pass
            return number in self._answers

    def _read(self, timeout_s: float) -> bool:
        if self._socket.fileno() < 0:
            raise ConnectionResetError(f"cluster {self.cluster_id} was ended")
        if not select.select([self._socket], [], [], timeout_s)[0]:
            return False
        # Descriptors come with the bytes of their own answer and of no other.
        data, fds, _, _ = socket.recv_fds(self._socket, 65536, 4)
        if not data:
            raise ConnectionResetError(f"cluster {self.cluster_id} is gone")
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            values = json.loads(line)
            number = values.pop("id")
            self._answers[number] = Answer(**{"value": None} | values, fds=tuple(fds))
        return True

    # ---- the process ----

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self) -> None:
        stopping.stop(self.pid)

    def go_on(self) -> None:
        stopping.resume(self.pid)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._close()

    def wait_exit(self) -> None:
        """After start("exit"): with status 0 and in time, whatever is in flight."""
        status = self.process.wait(_EXIT_S)
        self._close()
        if status != 0:
            raise AssertionError(f"cluster {self.cluster_id} exited with status {status}")

    def _close(self) -> None:
        with self._lock:
            self._socket.close()
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1

    def held(self) -> tuple[int, int]:
        """(descriptors, threads)."""
        return len(os.listdir(f"/proc/{self.pid}/fd")), len(os.listdir(f"/proc/{self.pid}/task"))

    def sockets(self, pid: int | None = None) -> set[str]:
        found = set()
        for descriptor in Path(f"/proc/{pid or self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                found.add(os.readlink(descriptor))
        return {name for name in found if name.startswith("socket:")}

    def status_kib(self, field: str) -> int:
        text = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{field}:"))

    def limit(self, which: int, value: int) -> Callable[[], None]:
        """Sets one of its resource limits; the result gives back what was."""
        before = resource.prlimit(self.pid, which)
        resource.prlimit(self.pid, which, (value, before[1]))
        return lambda: resource.prlimit(self.pid, which, before) and None


def wait_for_baseline(party: Party, baseline: tuple[int, int]) -> None:
    """Descriptors and threads, as held() told."""

    def held() -> bool:
        descriptors, threads = party.held()
        return descriptors <= baseline[0] and threads <= baseline[1]

    wait_until(held, f"cluster {party.cluster_id} back to {baseline} descriptors and threads")


def wire_between(transport: str, client: Party, server: Party) -> tuple[Wire, int]:
    """(the wire, the port at which the client finds the server behind it)."""
    if transport == "tcp":
        listener = socket.create_server((OWN, 0))
        port: int = listener.getsockname()[1]
        return Wire(listener, lambda: socket.create_connection((OWN, server.port))), port
    # Within a host both ask the kernel who is there, and it must name the ends, not the wire: the server makes the
    # listener and the client the connections.
    with socket.socket() as unused:
        unused.bind((OWN, 0))
        port = unused.getsockname()[1]
    listener = server.ask_socket("listen", f"datadist/{OWN}:{port}")
    return Wire(listener, lambda: client.ask_socket("connect", f"datadist/{OWN}:{server.port}")), port
