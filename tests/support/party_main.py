"""The program of party.Party: one engine on memory that the test shares; a JSON request a line, a JSON answer a line.

Calls of the engine run on threads of their own, so that the process can be told to fork or to exit meanwhile.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vllm_datadist_connector import _native

MIX, UINT8, DEVICE = 3, 4, 1
_PR_SET_PDEATHSIG = 1


def _key(kind: str, name: int) -> _native.Key:
    return {"request": _native.KEY_REQUEST, "prefix": _native.KEY_PREFIX}[kind], name, 0


class Party:
    def __init__(self, settings: dict[str, Any], memory: int) -> None:
        self._settings = settings
        self._memory = mmap.mmap(memory, 0)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._engine = _native.ManagedDataDist(settings["cluster_id"], MIX)
        status = self._engine.initialize(settings["options"])
        if status != _native.LLM_SUCCESS:
            raise RuntimeError(f"{_native.status_name(status)}: {_native.last_error()}")
        self._cache = -1
        self._idle = threading.Event()

    def _cluster(self, cluster_id: int, port: int) -> _native.ClusterInfo:
        host = self._settings["host"]
        return _native.ClusterInfo(cluster_id, [(host, port)], [(host, 0)])

    def port(self) -> tuple[int, int]:
        return self._engine.listen_port()

    def register(self, keys: list[tuple[str, int]]) -> tuple[int, int]:
        """A cache of all of the memory under a new id; with keys, one for each row."""
        if self._cache >= 0:
            self._engine.unregister_cache(self._cache)
        made = self._settings
        status, self._cache = self._engine.register_cache(
            _native.CACHE_CONTIGUOUS if keys else _native.CACHE_BLOCKS,
            len(made["offsets"]),
            [made["blocks"], made["block_bytes"]],
            UINT8,
            DEVICE,
            [self._base + offset for offset in made["offsets"]],
            [_key(*key) for key in keys],
        )
        return status, self._cache

    def link(self, cluster_id: int, port: int, timeout_ms: int) -> int:
        status, (result,) = self._engine.link_clusters([self._cluster(cluster_id, port)], timeout_ms)
        return result or status

    def unlink(self, cluster_id: int, port: int, timeout_ms: int, force: bool = False) -> int:
        status, (result,) = self._engine.unlink_clusters([self._cluster(cluster_id, port)], timeout_ms, force)
        return result or status

    def pull(self, cluster_id: int, cache_id: int, src: list[int], dst: list[int]) -> int:
        return self._engine.pull_blocks(cluster_id, cache_id, self._cache, src, dst)

    def pull_row(self, cluster_id: int, key: tuple[str, int], row: int) -> int:
        return self._engine.pull_rows(cluster_id, _key(*key), self._cache, dst_batch_index=row)

    def push(self, cluster_id: int, cache_id: int, src: list[int], dst: list[int]) -> int:
        tensors = len(self._settings["offsets"])
        return self._engine.push_layer(
            self._cache, 0, cluster_id, cache_id, 0, src_blocks=src, dst_blocks=dst, tensor_num_per_layer=tensors
        )

    def load(self, do: str, *arguments: Any) -> tuple[int, int]:
        """One call after the other until idle() is called; (the first failure, how many)."""
        self._idle.clear()
        count = 0
        while not self._idle.is_set():
            if status := getattr(self, do)(*arguments):
                return status, count
            count += 1
        return 0, count

    def idle(self) -> int:
        self._idle.set()
        return 0

    def is_linked(self, cluster_id: int) -> tuple[int, bool]:
        status, report = self._engine.query_link(cluster_id)
        return 0, status == _native.LLM_SUCCESS and report is not None and report.alive

    def finalize(self) -> int:
        self._engine.finalize()
        return 0


class Channel:
    """What the test asks of the process itself is answered on its main thread, the rest on threads."""

    def __init__(self, commands: socket.socket, party: Party) -> None:
        self._socket = commands
        self._party = party
        self._lock = threading.Lock()

    def serve(self) -> None:
        with self._socket.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                request = json.loads(line)
                if request["do"] == "exit":
                    return  # with whatever runs
                if own := getattr(self, request["do"], None):
                    own(request["id"], *request["args"])
                else:
                    threading.Thread(target=self._call, args=(request,), daemon=True).start()

    def _call(self, request: dict[str, Any]) -> None:
        started = time.monotonic()
        result = getattr(self._party, request["do"])(*request["args"])
        seconds = time.monotonic() - started
        status, value = result if isinstance(result, tuple) else (result, None)
        why = _native.last_error() if status else ""
        self._answer(request["id"], status=_native.status_name(status), why=why, value=value, seconds=seconds)

    def _answer(self, request_id: int, fds: tuple[int, ...] = (), **values: Any) -> None:
        line = json.dumps({"id": request_id, "status": "LLM_SUCCESS", "why": "", "seconds": 0.0, **values}) + "\n"
        with self._lock:
            socket.send_fds(self._socket, [line.encode()], fds)

    def listen(self, request_id: int, name: str) -> None:
        """An abstract name that a relay serves: who dials it finds this process there, as the kernel sees it."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind("\0" + name)
            listener.listen(128)
            self._answer(request_id, (listener.fileno(),))

    def connect(self, request_id: int, name: str) -> None:
        """The other end of such a relay: who listens there sees this process come."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            try:
                client.connect("\0" + name)
            except OSError as error:
                self._answer(request_id, status="LLM_LINK_FAILED", why=str(error))
                return
            self._answer(request_id, (client.fileno(),))

    def fork(self, request_id: int) -> None:
        child = os.fork()
        if child == 0:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a test that fails leaves nobody behind
            while True:
                signal.pause()
        self._answer(request_id, value=child)

    def reap(self, request_id: int, child: int) -> None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        self._answer(request_id)

    def can_open(self, request_id: int) -> None:
        try:
            os.close(os.dup(0))
        except OSError as error:
            self._answer(request_id, value=False, why=str(error))
        else:
            self._answer(request_id, value=True)

    def can_map(self, request_id: int, size: int) -> None:
        try:
            mmap.mmap(-1, size).close()
        except OSError as error:
            self._answer(request_id, value=False, why=str(error))
        else:
            self._answer(request_id, value=True)


def main() -> None:
    commands = socket.socket(fileno=int(sys.argv[1]))
    party = Party(json.loads(sys.argv[3]), int(sys.argv[2]))
    Channel(commands, party).serve()


if __name__ == "__main__":
    main()
