"""Two ends of transfers of the native API whose memories the test sees whole, byte for byte.

The peer is either ourselves, over a loopback link, or a process: then its memory is a file that both have mapped.
`python -m support.shared_ends SETTINGS` is that process: a JSON call a line in, a JSON result a line out.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from support.arenas import OURS, PEER, link_with_itself, managed
from support.endpoints import LOOPBACK, check
from support.transfer_oracle import CacheModel
from vllm_datadist_connector import _native

Bytes = npt.NDArray[np.uint8]

MEMORY_BYTES = 16 << 10
_DEVICE = 1


class Engine(Protocol):
    def __call__(self, method: str, *args: Any) -> Any:
        """A method of the end's ManagedDataDist."""


@dataclass(frozen=True)
class End:
    call: Engine
    memory: Bytes
    base: int
    """The address of memory[0] where the engine is."""

    def register(self, cache: CacheModel, keys: Sequence[_native.Key | None] = (), accessible: bool = True) -> int:
        """The cache id."""
        layout = _native.CACHE_BLOCKS if cache.layout == "blocks" else _native.CACHE_CONTIGUOUS
        addrs = [self.base + start for start in cache.starts]
        status, cache_id = self.call(
            "register_cache", layout, cache.tensors, cache.shape, cache.data_type, _DEVICE, addrs, keys, accessible
        )
        check(status)
        return int(cache_id)

    def unregister(self, cache_id: int) -> None:
        check(self.call("unregister_cache", cache_id))


@dataclass(frozen=True)
class Ends:
    """Our end, where calls are made, and the peer's: cluster PEER."""

    ours: End
    theirs: End
    engine: _native.ManagedDataDist
    remote_accessible: bool

    def fill(self, seed: int) -> tuple[bytearray, bytearray]:
        """Random bytes in both memories, and copies of them."""
        random = np.random.default_rng(seed)
        for end in (self.ours, self.theirs):
            end.memory[:] = random.integers(0, 256, len(end.memory), dtype=np.uint8)
        return bytearray(self.ours.memory.tobytes()), bytearray(self.theirs.memory.tobytes())


def _options(transport: str, remote_accessible: bool) -> dict[str, str]:
    return {"datadist.Transport": transport, "llm.EnableRemoteCacheAccessible": "1" if remote_accessible else "0"}


def _end(engine: _native.ManagedDataDist, memory: Bytes) -> End:
    return End(lambda method, *args: getattr(engine, method)(*args), memory, memory.ctypes.data)


@contextmanager
def loopback_ends(transport: str, remote_accessible: bool) -> Iterator[Ends]:
    """Both in this process: the peer's caches are ours too, in a memory of their own."""
    with managed(_options(transport, remote_accessible)) as engine:
        link_with_itself(engine)
        ends = [_end(engine, np.zeros(MEMORY_BYTES, dtype=np.uint8)) for _ in range(2)]
        yield Ends(ends[0], ends[1], engine, remote_accessible)


@contextmanager
def process_ends(transport: str, remote_accessible: bool) -> Iterator[Ends]:
    """The peer in a process of its own."""
    options = _options(transport, remote_accessible)
    with _shared_memory() as (fd, memory), managed(options) as engine, _PeerProcess(options, fd) as peer:
        info = _native.ClusterInfo(PEER, [(LOOPBACK, peer.port)], [(LOOPBACK, 0)])
        check(engine.link_clusters([info], 20_000)[0])
        ours = _end(engine, np.zeros(MEMORY_BYTES, dtype=np.uint8))
        yield Ends(ours, End(peer, memory, peer.base), engine, remote_accessible)


@contextmanager
def _shared_memory() -> Iterator[tuple[int, Bytes]]:
    fd = os.memfd_create("datadist-test")
    try:
        os.ftruncate(fd, MEMORY_BYTES)
        yield fd, np.frombuffer(mmap.mmap(fd, MEMORY_BYTES), dtype=np.uint8)
    finally:
        os.close(fd)


class _PeerProcess:
    def __init__(self, options: Mapping[str, str], fd: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.shared_ends", json.dumps({"options": options, "fd": fd})],
            cwd=Path(__file__).resolve().parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[fd],
        )
        self.base, self.port = self._answer()

    def __enter__(self) -> _PeerProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def __call__(self, method: str, *args: Any) -> Any:
        if self._process.stdin is None:
            raise RuntimeError("the peer process has no standard input")
        self._process.stdin.write(json.dumps([method, args]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        if self._process.stdout is None:
            raise RuntimeError("the peer process has no standard output")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer process ended with status {self._process.wait()}")
        return json.loads(line)


def main() -> None:
    settings = json.loads(sys.argv[1])
    memory = mmap.mmap(settings["fd"], MEMORY_BYTES)
    engine = _native.ManagedDataDist(PEER, 3)
    check(engine.initialize({"llm.DeviceId": "0", "llm.ListenIpInfo": f"{LOOPBACK}:0"} | settings["options"]))
    status, port = engine.listen_port()
    check(status)
    print(json.dumps([ctypes.addressof(ctypes.c_char.from_buffer(memory)), port]), flush=True)
    for line in sys.stdin:
        method, args = json.loads(line)
        print(json.dumps(getattr(engine, method)(*args)), flush=True)
    engine.finalize()


if __name__ == "__main__":
    main()


__all__ = ["MEMORY_BYTES", "OURS", "PEER", "End", "Ends", "loopback_ends", "process_ends"]
